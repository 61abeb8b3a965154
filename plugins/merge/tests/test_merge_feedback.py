"""Rounding to a packed weight's grid: the codes of OPTQ's algorithm."""

from itertools import pairwise

import pytest
import torch
from modulora_conformance.cases import correlated, gaussian, generator
from modulora_kernels import feedback
from modulora_kernels.feedback import rounded_to_grid

from modulora_core import registry
from modulora_core.errors import ShapeError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (24, 192)


@pytest.fixture(params=[("nf4", {}), ("gguf", {"type": "Q4_1"}), ("int8", {})], ids=str)
def case(request):
    """A quantizer, a packed weight, V = Ŵ and a small change of low rank, and H."""
    name, options = request.param
    quantizer = registry.create(name, options)
    packed = quantizer.pack(gaussian(SHAPE, 0))
    W = quantizer.dequantize_tile(packed, (0, SHAPE[0]), torch.float32)
    B, A = (torch.randn(n, 2, generator=generator(i)) for i, n in enumerate(SHAPE))
    step = 0.02 if name == "int8" else 0.1  # of weights of 0.02
    return quantizer, packed, W + step * 0.02 * B @ A.T, correlated(SHAPE[1]).hessian


def value(case, packed):
    return case[0].dequantize_tile(packed, (0, SHAPE[0]), torch.float32)


def error(E, H):
    return float((E.double() @ H.double() * E.double()).sum())


def damped(H, damping):
    return H + damping * H.diagonal().mean() * torch.eye(len(H))


def test_the_points_are_those_of_the_algorithm_of_one_column_at_a_time(case):
    """OPTQ's equations 2 and 3 in fp64, with a whole inverse and no blocks."""
    quantizer, packed, V, H = case
    order = H.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(damped(H.double(), 0.1)[order][:, order])
    U = torch.linalg.cholesky(inverse, upper=True)
    W, points = V.double()[:, order].clone(), torch.empty_like(V)
    for j, column in enumerate(order.tolist()):
        w = W[:, j : j + 1].float()
        point = quantizer.snap(packed, (0, SHAPE[0]), (column, column + 1), w)
        points[:, column] = point[:, 0]
        W[:, j:] -= torch.outer((W[:, j] - point[:, 0]) / U[j, j], U[j, j:])
    found = value(case, rounded_to_grid(quantizer, packed, V, H, damping=0.1))
    differing = (found - points).abs() > 1e-6  # ties, and what follows from them
    assert differing.float().mean() < 0.01


def test_outputs_are_nearer_than_by_rounding_each_weight(case):
    quantizer, packed, V, H = case
    nearest = error(V - value(case, quantizer.snapped(packed, V)), H)
    fed = error(V - value(case, rounded_to_grid(quantizer, packed, V, H, damping=0.01)), H)
    assert fed < 0.8 * nearest


def test_a_sweep_makes_no_rows_error_larger(case):
    quantizer, packed, V, H = case
    found = []
    for sweeps in (0, 1, 3):
        made = rounded_to_grid(quantizer, packed, V, H, damping=0.01, sweeps=sweeps)
        E = (V - value(case, made)).double()
        found.append((E @ damped(H, 0.01).double() * E).sum(1))
    assert all((after <= before * (1 + 1e-4)).all() for before, after in pairwise(found))
    assert found[1].sum() < found[0].sum()


def test_no_single_move_is_better_after_many_sweeps(case):
    quantizer, packed, V, H = case
    found = value(case, rounded_to_grid(quantizer, packed, V, H, damping=0.01, sweeps=50))
    H = damped(H, 0.01)
    best = found + (V - found) @ H / H.diagonal()
    snapped = quantizer.snap(packed, (0, SHAPE[0]), (0, SHAPE[1]), best)
    differing = (snapped - found).abs() > 1e-6  # ties
    assert differing.float().mean() < 0.001


def test_one_block_and_many_give_the_same_points(case, monkeypatch):
    quantizer, packed, V, H = case
    found = []
    for block in (16, 192):
        monkeypatch.setattr(feedback, "BLOCK", block)
        made = rounded_to_grid(quantizer, packed, V, H, damping=0.1, sweeps=1)
        found.append(value(case, made))
    differing = (found[0] - found[1]).abs() > 1e-6  # sums in another order
    assert differing.float().mean() < 0.01


def test_a_weight_without_a_change_keeps_its_bytes(case):
    quantizer, packed, _, H = case
    made = rounded_to_grid(quantizer, packed, value(case, packed), H, damping=0.01)
    for name, tensor in packed.tensors.items():
        assert torch.equal(made.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_inputs_that_were_always_zero_get_the_nearest_points(case):
    quantizer, packed, V, H = case
    H = H.clone()
    H[5], H[:, 5] = 0, 0
    found = value(case, rounded_to_grid(quantizer, packed, V, H, damping=0.01))
    nearest = quantizer.snap(packed, (0, SHAPE[0]), (5, 6), V[:, 5:6])
    assert torch.allclose(found[:, 5:6], nearest, rtol=1e-6)


def test_a_second_moment_that_does_not_fit_is_refused(case):
    quantizer, packed, V, H = case
    with pytest.raises(ShapeError, match=r"expected a second moment of shape \[192, 192\]"):
        rounded_to_grid(quantizer, packed, V, H[:9, :9], damping=0.01)
