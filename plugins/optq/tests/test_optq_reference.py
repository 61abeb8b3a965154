"""The reference against the paper's equations, computed with explicit inverses."""

import pytest
import torch
from modulora_optq import reference
from modulora_optq.options import Options

from modulora_core.errors import WeightError

PLAIN = {"act_order": False, "static_groups": False, "range_search": False}


def layer(rows=6, columns=40, seed=0):
    """A weight and the second moment of correlated inputs of unlike sizes, fp64."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.rand(columns, generator=generator, dtype=torch.float64) * 3
    X = (torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix) * sizes
    return W, X.T @ X / len(X)


def extremes(W, bits):
    """Scale and zero point of a group from its extremes, from the definition."""
    low, high = W.min(1).values.clamp(max=0), W.max(1).values.clamp(min=0)
    s = ((high - low) / (2**bits - 1)).half().double()
    return s, (-low / s).round().clamp(0, 2**bits - 1)


def nearest(w, s, z, bits):
    return ((w / s).round() + z).clamp(0, 2**bits - 1)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, -1), (8, 16)])
def test_the_loop_is_optimal_brain_quantization_in_a_fixed_order(bits, group_size):
    """Equations 2 and 3, with H_F⁻¹ inverted again for the columns that are left."""
    W, H = layer()
    options = Options(bits=bits, group_size=group_size, damping=0.05, **PLAIN)
    solution = reference.solve(W, H, options)
    size = 16 if group_size == 16 else 40
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(40, dtype=H.dtype)
    left = W.clone()
    for j in range(40):
        if j % size == 0:
            s, z = extremes(left[:, j : j + size], bits)
            assert torch.equal(solution.scales[:, j // size].double(), s)
            assert torch.equal(solution.zeros[:, j // size].double(), z)
        q = nearest(left[:, j], s, z, bits)
        assert torch.equal(solution.codes[:, j].double(), q)
        inverse = damped[j:, j:].inverse()
        error = (left[:, j] - s * (q - z)) / inverse[0, 0]
        left[:, j:] -= torch.outer(error, inverse[0])


@pytest.mark.parametrize("damping", [0.001, 1.0])
def test_U_is_the_upper_cholesky_factor_of_the_damped_inverse(damping):
    H = layer()[1]
    H = H / H.diagonal().mean()
    U, _ = reference.factor("optq", H, damping)
    identity = torch.eye(40, dtype=H.dtype)
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    assert torch.allclose(U.T @ U @ (H + damping * identity), identity, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_takes_the_least_weighted_error_of_all_candidates(symmetric):
    W = layer(rows=5, columns=20)[0]
    loss = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    options = Options(bits=3, symmetric=symmetric)
    s, z = reference.grid(W, loss, options)
    for o in range(5):
        tried = []
        for each_s, each_z in reference.candidates(W[o : o + 1], options):
            step = ((W[o] / each_s).round() + each_z).clamp(0, 7) - each_z
            tried.append(
                (float((loss * (W[o] - each_s * step) ** 2).sum()), float(each_s), float(each_z))
            )
        assert min(tried, key=lambda t: t[0])[1:] == (float(s[o]), float(z[o]))


def test_static_groups_take_their_grids_from_the_given_weight():
    W, H = layer()
    options = Options(bits=3, group_size=16, static_groups=True, range_search=False)
    solution = reference.solve(W, H, options)
    for g in range(3):
        s, z = extremes(W[:, 16 * g : 16 * (g + 1)], 3)
        assert torch.equal(solution.scales[:, g].double(), s)
        assert torch.equal(solution.zeros[:, g].double(), z)


@pytest.mark.parametrize("act_order", [False, True])
def test_weights_of_dead_inputs_become_zero_and_change_nothing(act_order):
    W, H = layer()
    dead = [3, 17, 39]
    H[dead] = 0
    H[:, dead] = 0
    options = Options(group_size=16, act_order=act_order)
    wild = W.clone()
    wild[:, dead] = 1e3
    ours, theirs = (reference.solve(w, H, options).dequantize(options) for w in (W, wild))
    assert torch.equal(ours, theirs)
    assert (ours[:, dead] == 0).all()


def test_damping_grows_until_H_can_be_factorized():
    """Rounding can leave a second moment with an eigenvalue just below zero."""
    Q = torch.linalg.qr(layer(40)[0]).Q
    eigenvalues = torch.linspace(-0.1, 2.1, 40, dtype=torch.float64)
    H = Q @ eigenvalues.diag() @ Q.T
    U, lam = reference.factor("optq", H, 0.01)
    assert lam == pytest.approx(0.16)  # the first of 0.01 · 2^k above 0.1
    added = (U.T @ U).inverse().diagonal().mean() - H.diagonal().mean()
    assert float(added) == pytest.approx(0.16)


def test_a_matrix_that_is_no_second_moment_is_refused():
    W, H = layer()
    H[5, 5] = -1
    with pytest.raises(WeightError, match="without negative numbers on its diagonal, got -1"):
        reference.solve(W, H, Options())
    swapped = torch.full((40, 40), -1e9, dtype=torch.float64).fill_diagonal_(1)
    with pytest.raises(WeightError, match=r"positive semidefinite .* \[40, 40\].* calibrate again"):
        reference.solve(W, swapped, Options())
