"""Where a kernel's scratch begins."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")


@pytest.mark.parametrize("name", ["uint8", "int16", "float32", "int64"])
def test_scratch_has_its_shape_and_begins_with_a_line_of_the_cache(name: str) -> None:
    import numpy as np

    from modulora_core.kernels.scratch import scratch

    kept = []  # what is still held isn't handed out again, so each begins elsewhere
    for columns in range(1, 40):
        room = scratch(3, columns, getattr(np, name))
        assert room.shape == (3, columns)
        assert room.dtype == name
        assert room.flags.c_contiguous
        assert room.ctypes.data % 64 == 0
        kept.append(room)
    for number, room in enumerate(kept):
        room[:] = number
    assert all((room == number).all() for number, room in enumerate(kept))
