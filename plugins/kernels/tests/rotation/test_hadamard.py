"""Hadamard matrices: the orders that a construction reaches, orthogonality, and digests."""

import hashlib

import pytest
import torch
from modulora_kernels.rotation.hadamard import hadamard

from modulora_core.errors import ShapeError

DIGESTS = {
    8: "7c99a8eda1a433af", 12: "db7478025ce74776", 28: "3ec6c53133760a03", 36: "1a7aed2f42a8c71d",
    52: "f50db5d0f93762d3", 92: "c70b0de15bc417e4", 116: "d231cd077e12d684",
    156: "482eaac39ce25fbf", 172: "ee18d5ba272fb793", 924: "43a042d7e9d59369",
}  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, *range(4, 188, 4), 232, 344, 672, 924, 1024])
def test_rows_are_orthogonal_and_entries_are_signs(order):
    H = hadamard(order)
    assert torch.equal(H.abs(), torch.ones(order, order, dtype=torch.int8))
    H = H.float()  # sums of up to 1024 signs are exact
    assert torch.equal(H @ H.T, order * torch.eye(order))


@pytest.mark.parametrize("order", DIGESTS)
def test_a_matrix_never_changes_because_checkpoints_depend_on_it(order):
    assert hashlib.sha256(hadamard(order).numpy().tobytes()).hexdigest()[:16] == DIGESTS[order]


@pytest.mark.parametrize("order", [0, 3, 188])
def test_an_order_out_of_reach_is_refused(order):
    with pytest.raises(ShapeError, match=f"order {order}: expected"):
        hadamard(order)
