"""The solver gives the reference's codes: bit for bit in fp64, and in fp32 but for ties."""

from itertools import pairwise

import pytest
import torch
from modulora_conformance.fixtures import without_kernels
from modulora_optq import reference, solver
from modulora_optq.options import Options

DYNAMIC = {"static_groups": False}
CHOICES = [
    {"bits": 3, "symmetric": True},
    {"bits": 3, "act_order": False, "range_search": False},
    {"bits": 2, "group_size": 48},
    {"bits": 8, "act_order": False, **DYNAMIC},
    {"bits": 4, "range_search": False, **DYNAMIC},
    {"bits": 2, "group_size": 200, **DYNAMIC},
    {"bits": 3, "group_size": -1, **DYNAMIC},
]


def paper(**choice):
    """Options of OPTQ alone, which the reference has."""
    return Options(sweeps=0, **choice)


def layer(rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows + columns)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    X = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    X = X.cumsum(1) * torch.rand(columns, generator=generator, dtype=torch.float64)
    return W.to(dtype), (X.T @ X / len(X)).to(dtype)


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        without_kernels(monkeypatch)
    return request.param


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_codes_and_grids_are_the_references_bit_for_bit_in_fp64(choice, path):
    W, H = layer(5, 330, torch.float64)
    options = paper(**choice)
    ours, theirs = solver.solve(W, H, options), reference.solve(W, H, options)
    for name in ("codes", "scales", "zeros", "permutation"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_row_whose_codes_differ_in_fp32_first_differs_at_a_tie(choice, path):
    W, H = layer(32, 320, torch.float32)
    options = paper(**choice)
    ours, theirs = solver.solve(W, H, options), reference.solve(W, H, options)
    rows = different(ours, theirs, options).any(dim=1).nonzero().flatten().tolist()
    assert len(rows) <= 3
    for row in rows:
        assert_first_difference_is_a_tie(
            row, reference.prepare(W, H, options), ours, theirs, options
        )


def spread(solution, problem, options):
    """Codes, scales and zeros of every column, in the order of quantization, fp64 ``[out, in]``."""
    order = problem.order if solution.permutation is None else torch.arange(solution.codes.shape[1])
    group = torch.arange(solution.codes.shape[1]) // options.group(solution.codes.shape[1])
    values = solution.codes, solution.scales[:, group], solution.zeros[:, group]
    q, s, z = (value[:, order].double() for value in values)
    return q, s, z


def different(a, b, options):
    group = torch.arange(a.codes.shape[1]) // options.group(a.codes.shape[1])
    grids = (a.scales != b.scales) | (a.zeros != b.zeros)
    return (a.codes != b.codes) | grids[:, group]


def assert_first_difference_is_a_tie(row, problem, ours, theirs, options):
    """Quantize the row again in fp64 with our codes, up to the first column that differs."""
    (q, s, z), (p, r, y) = (
        (value[row] for value in spread(each, problem, options)) for each in (ours, theirs)
    )
    first = int(((q != p) | (s != r) | (z != y)).nonzero()[0])
    w, U = problem.W[row].double(), problem.U.double()
    for j in range(first):
        w[j:] -= (w[j] - s[j] * (q[j] - z[j])) / U[j, j] * U[j, j:]
    if (s[first], z[first]) == (r[first], y[first]):
        midpoint = (q[first] + p[first]) / 2 - z[first]
        assert abs(q[first] - p[first]) == 1
        assert abs(w[first] / s[first] - midpoint) < 1e-3
        return
    columns = problem.group == problem.group[first]
    if options.static_groups:  # grids came before all codes
        w = problem.W[row].double()
    part = w[columns]
    weight = problem.loss[columns].double()
    losses = []
    for scale, zero in ((s[first], z[first]), (r[first], y[first])):
        step = ((part / scale).round() + zero).clamp(0, options.maxq) - zero
        losses.append(float((weight * (part - scale * step) ** 2).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e6, 1e300])
@pytest.mark.parametrize("range_search", [False, True])
def test_kernels_choose_the_references_grids_at_any_scale(scale, range_search):
    pytest.importorskip("numba")
    W, H = layer(100, 32, torch.float64)
    options = paper(range_search=range_search)
    ours, theirs = (each.solve(W * scale, H, options) for each in (solver, reference))
    assert torch.equal(ours.scales, theirs.scales)
    assert torch.equal(ours.zeros, theirs.zeros)


def errors(W, M, solution, options):
    """r M rᵀ of each row, ``[out]``."""
    R = W - solution.dequantize(options).to(W.dtype)
    return ((R @ M) * R).sum(1)


def damped(W, H, options):
    """M, columns in the weight's own order."""
    problem = reference.prepare(W, H, options)
    place = torch.argsort(problem.order)
    return problem.M[place[:, None], place]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_sweep_makes_no_row_worse_and_most_better(choice, path):
    W, H = layer(24, 330, torch.float64)
    M = damped(W, H, Options(**choice))
    found = [
        errors(W, M, solver.solve(W, H, Options(sweeps=sweeps, **choice)), Options(**choice))
        for sweeps in (0, 1, 2)
    ]
    for before, after in pairwise(found):
        assert bool((after <= before * (1 + 1e-9)).all())
    assert int((found[1] < 0.999 * found[0]).sum()) > len(W) / 2


@pytest.mark.parametrize("sweeps", [0, 2])
def test_rows_in_turn_make_up_for_each_others_errors(sweeps, path):
    """Rows whose gradients agree: the errors of a column should cancel each other."""
    W, H = layer(96, 128, torch.float64)
    H_O = torch.ones(96, 96, dtype=torch.float64) + torch.eye(96, dtype=torch.float64)
    options = Options(bits=2, sweeps=sweeps)
    found = []
    for output_hessian in (None, H_O):
        E = W - solver.solve(W, H, options, output_hessian).dequantize(options).double()
        found.append(float(((H_O @ E @ H) * E).sum()))
    assert found[1] < 0.8 * found[0]  # λ is four times the mean of H_O, so some errors stay
