"""Where a kernel's scratch begins, and whose it is."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

pytest.importorskip("numba")


@pytest.mark.parametrize("name", ["uint8", "int16", "float32", "int64"])
def test_scratch_has_its_shape_and_begins_with_a_line_of_the_cache(name: str) -> None:
    import numpy as np

    from modulora_core.kernels.cpu.scratch import scratch

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


ON_STACK = """
import numpy as np
from numba import prange
from modulora_core.kernels import jit
from modulora_core.kernels.cpu.scratch import on_stack

bytes_, numbers, others = on_stack(100, np.uint8), on_stack(1000, np.float32), on_stack(1000, np.float32)

@jit(borrows=True)
def sums_of_two(k):
    few, a, b = bytes_(), numbers(), others()
    few[:] = k
    a[:] = k
    b[:] = 2 * k
    return few[99] + a.sum() + b.sum()

@jit(parallel=True)
def all_sums(out):
    for k in prange(out.size):
        out[k] = sums_of_two(k % 100)

@jit()
def places(out):
    for k in range(len(out)):
        a, b = numbers(), others()
        out[k, 0], out[k, 1] = a.ctypes.data, b.ctypes.data
        out[k, 2], out[k, 3] = a.size, b.itemsize
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("stack")
    (folder / "kernels_on_stack.py").write_text(ON_STACK, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module("kernels_on_stack")


def test_what_is_on_the_stack_is_a_threads_own_and_no_two_share_a_place(module: ModuleType) -> None:
    import numpy as np

    out = np.zeros(5000)
    module.all_sums(out)
    k = np.arange(5000) % 100
    assert (out == k + 1000 * k + 2000 * k).all()


def test_what_is_on_the_stack_begins_with_a_line_and_is_the_same_in_each_turn_of_a_loop(
    module: ModuleType,
) -> None:
    import numpy as np

    out = np.zeros((5, 4), np.int64)
    module.places(out)
    assert (out == out[0]).all()
    first, second, size, itemsize = out[0].tolist()
    assert (size, itemsize) == (1000, 4)
    assert first % 64 == second % 64 == 0
    assert abs(first - second) >= 4000


def test_the_stack_has_room_for_so_much() -> None:
    import numpy as np

    from modulora_core.kernels.cpu.scratch import MOST_ON_STACK, on_stack

    on_stack(MOST_ON_STACK // 4, np.float32)
    message = (
        f"expected at most {MOST_ON_STACK} bytes.*got {MOST_ON_STACK + 4}; decode fewer columns"
    )
    with pytest.raises(ValueError, match=message):
        on_stack(MOST_ON_STACK // 4 + 1, np.float32)
