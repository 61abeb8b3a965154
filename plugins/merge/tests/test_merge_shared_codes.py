"""Rounding to codes that weights of several columns share: lattices and trellises."""

import pytest
import torch
from modulora_conformance.cases import correlated, gaussian, generator
from modulora_kernels.feedback import rounded_to_grid

from modulora_core import registry

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (48, 192)
CODES = {"codes", "residual", "trellis"}


@pytest.fixture(
    scope="module",
    params=[("quip-sharp-e8", {}), ("quip-sharp-e8", {"bits": 4}), ("qtip", {})],
    ids=str,
)
def case(request):
    """A quantizer, a packed weight, its Ŵ, and H."""
    name, options = request.param
    quantizer, H = registry.create(name, options), correlated(SHAPE[1])
    packed = quantizer.pack(gaussian(SHAPE, 0), H)
    return quantizer, packed, value(quantizer, packed), H.hessian


def value(quantizer, packed):
    return quantizer.dequantize_tile(packed, (0, SHAPE[0]), torch.float32)


def change():
    """Of low rank, about a fifth of a weight."""
    B, A = (torch.randn(n, 2, generator=generator(i)) for i, n in enumerate(SHAPE))
    return 0.2 * 0.02 * B @ A.T


def error(E, H):
    return float((E.double() @ H.double() * E.double()).sum())


def test_no_change_of_the_weight_changes_no_byte(case):
    quantizer, packed, W, H = case
    same = rounded_to_grid(quantizer, packed, W, H, damping=0.01, sweeps=1)
    for name, tensor in packed.tensors.items():
        assert torch.equal(same.tensors[name], tensor)


def test_codes_alone_move_and_carry_most_of_the_change(case):
    """Each row of the packed weight has an error of its own, so the limit is a share."""
    quantizer, packed, W, H = case
    merged = rounded_to_grid(quantizer, packed, W + change(), H, damping=0.01, sweeps=1)
    assert merged.layout == packed.layout
    moved = {n for n, t in packed.tensors.items() if not torch.equal(merged.tensors[n], t)}
    assert moved
    assert moved <= CODES
    left = error(W + change() - value(quantizer, merged), H)
    assert left < 0.5 * error(change(), H)


def test_feedback_does_better_than_nearest_points(case):
    """With a damping of 10⁹ the errors of one block have no effect on another."""
    quantizer, packed, W, H = case
    errors = [
        error(W + change() - value(quantizer, merged), H)
        for damping in (0.01, 1e9)
        for merged in [
            rounded_to_grid(quantizer, packed, W + change(), H, damping=damping, sweeps=0)
        ]
    ]
    assert errors[0] < 0.8 * errors[1]
