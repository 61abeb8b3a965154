"""L6: packed tensors are read alone, and within their bounds."""

from __future__ import annotations

import sys

import pytest
import torch

from modulora_conformance.cases import packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.elsewhere import elsewhere, read_protected, request
from modulora_conformance.levels.processes import READS
from modulora_conformance.pages import Place
from modulora_conformance.results import HARDWARE
from modulora_core.spec import Quantizer

SHAPES = ((1, 1), (5, 131), (9, 576), (40, 258))
"""Before they fit: rows that end anywhere in a byte, a word and a vector."""

ROWS = 35
"""Rows of x beside 1 and 2: more than a block of 32."""

ONLY_READ = "test_packed_tensors_are_only_read"


class Protected(Level):
    """Packed tensors are mapped from a file: nothing is written to them, or read beside them."""

    level, title = "L6", "persistence"

    @needs(READS)
    def test_packed_tensors_are_only_read(self, quantizer: Quantizer) -> None:
        """If this fails: reading or a product writes to packed tensors or x, if only the same
        value.

        They may be mapped from a file that nobody may write. Work in your own memory.
        """
        _read_in_protected_memory(quantizer, None, "a write to packed tensors or x")

    @pytest.mark.parametrize("place", Place, ids=lambda place: place.value)
    @needs(READS, ONLY_READ)
    def test_nothing_beside_the_tensors_is_read(self, quantizer: Quantizer, place: Place) -> None:
        """If this fails: a kernel reads or writes beyond an end of a packed tensor or of x.

        It reads a whole vector where fewer bytes are left. Bound the last block.
        """
        _read_in_protected_memory(quantizer, place, "a read beyond packed tensors or x")


def _read_in_protected_memory(quantizer: Quantizer, place: Place | None, fault: str) -> None:
    if sys.platform != "linux":
        pytest.skip(f"{HARDWARE}pages are protected on Linux alone")
    weights = [packed(quantizer, shape) for shape in SHAPES]
    dtypes = (torch.float32, torch.bfloat16)
    asked = [request(quantizer, weight, *dtypes, rows=ROWS) for weight in weights]
    try:
        elsewhere(read_protected, asked, place)
    except pytest.fail.Exception as failure:
        cause = fault if "exit code" in str(failure.msg) else "an error"
        pytest.fail(
            f"packed tensors in protected memory: expected no fault, got {cause}: {failure.msg}",
            pytrace=False,
        )
