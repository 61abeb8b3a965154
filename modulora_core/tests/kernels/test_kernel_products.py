"""Tiles and few-row products made of a decoder that isn't one of our plugins', against float64."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from modulora_core.tests.scaled_rows import DECODER, weight

pytest.importorskip("numba")

SHAPES = [(1, 1), (5, 3), (17, 130), (64, 48), (33, 2100)]
"""The last has more columns than are decoded at once, and none but one of them whole vectors, strips or shares."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "outsiders_rows.py").write_text(DECODER, encoding="utf-8")
    return folder


@pytest.fixture
def module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("outsiders_rows")


def test_the_source_of_a_kernel_is_its_decoders(module: ModuleType) -> None:
    """numba reads it before it keeps compiled code, and on Python 3.13 fails at a line in the midst of a string."""
    for kernel in (module.rows._few, *module.rows._many.values(), *module.rows._fill.values()):
        assert "def decode(weight, row, start, columns, out):" in inspect.getsource(kernel.py_func)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_decoded_weight(
    module: ModuleType, shape: tuple[int, int], n: int
) -> None:
    codes, scales, W = weight(*shape)
    for transpose in (False, True):
        features = W.shape[1] if transpose else W.shape[0]
        x = torch.randn(n, W.shape[0] if transpose else W.shape[1])
        y = module.rows.matmul((codes, scales), x, features, transpose)
        expected = x.double() @ (W if transpose else W.T)
        # an fp32 sum of k products is off by less than k units of the last place of the sum of their magnitudes
        bound = x.shape[1] * 2.0**-23 * (x.double().abs() @ (W if transpose else W.T).abs())
        assert y.shape == (n, features)
        assert y.is_contiguous()
        assert bool(((y - expected).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [2, 4, 7])
def test_a_product_takes_memory_as_often_however_many_rows_are_decoded(
    module: ModuleType, n: int, transpose: bool
) -> None:
    """The C library may give other memory each time, and what no longer is in a cache took half of the time again."""
    from numba.core.runtime import _nrt_python as memory  # numba's own module for what it allocates
    from numba.core.runtime import rtsys

    def taken(rows: int) -> int:
        codes, scales, W = weight(rows, 48)
        x = torch.randn(n, W.shape[0] if transpose else W.shape[1])
        before = rtsys.get_allocation_stats().mi_alloc
        module.rows.matmul((codes, scales), x, 48 if transpose else rows, transpose)
        return int(rtsys.get_allocation_stats().mi_alloc - before)

    memory.memsys_enable_stats()
    try:
        taken(16)  # compiled, and the threads started
        assert 0 < taken(128) == taken(2048)
    finally:
        memory.memsys_disable_stats()


@pytest.mark.parametrize("n", [4, 7, 16, 33, 64])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 96)], ids=str)
def test_products_of_bf16_are_those_of_the_weight_rounded_to_it(
    module: ModuleType, shape: tuple[int, int], n: int
) -> None:
    codes, scales, W = weight(*shape)
    W = (codes.float() * scales[:, None]).bfloat16().double()
    for transpose in (False, True):
        features = W.shape[1] if transpose else W.shape[0]
        x = torch.randn(n, W.shape[0] if transpose else W.shape[1]).bfloat16()
        y = module.rows.matmul((codes, scales), x, features, transpose)
        expected = x.double() @ (W if transpose else W.T)
        # products of bf16 numbers are exact in fp32; the sums are as above
        bound = x.shape[1] * 2.0**-23 * (x.double().abs() @ (W if transpose else W.T).abs())
        assert y.dtype == torch.float32
        assert y.shape == (n, features)
        assert bool(((y - expected).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_the_decoded_rows_to_the_bit(module: ModuleType, shape: tuple[int, int]) -> None:
    codes, scales, _ = weight(*shape)
    for first in {0, shape[0] // 2}:
        out = torch.full((shape[0] - first, shape[1]), torch.nan)
        module.rows.dequantize((codes, scales), first, out)
        assert torch.equal(out, codes[first:].float() * scales[first:, None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tiles_of_other_dtypes_are_rounded_as_torch_does(
    module: ModuleType, dtype: torch.dtype
) -> None:
    bits = torch.randint(0, 2**31, (19, 2100), generator=torch.Generator().manual_seed(0)).to(
        torch.int32
    )
    special = [
        0x7F800000,
        0x7F800001,
        0x7FFFFFFF,
        0x7F7FFFFF,
        0x7F7F7FFF,
        0x3F808000,
        0x3F818000,
        1,
        0,
    ]
    bits[3, : len(special)] = torch.tensor(special, dtype=torch.int32)
    numbers = torch.cat([bits, bits | -(2**31)]).view(torch.float32)  # half of them negative
    tile = module.rows.tile((numbers, torch.ones(38)), (2, 37), 2100, dtype)
    torch.testing.assert_close(tile, numbers[2:37].to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(1, torch.float32), (6, torch.float32), (40, torch.float32), (40, torch.bfloat16)],
)
def test_the_bits_of_a_product_do_not_depend_on_the_number_of_threads(
    module: ModuleType, n: int, dtype: torch.dtype
) -> None:
    codes, scales, _ = weight(300, 200)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, y = (
                torch.randn(n, k, generator=torch.Generator().manual_seed(k)).to(dtype)
                for k in (200, 300)
            )
            parts = [
                module.rows.matmul((codes, scales), x, 300),
                module.rows.matmul((codes, scales), y, 200, True),
            ]
            found.append(parts)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_beyond_the_weight_counts_nothing_whatever_is_in_memory(module: ModuleType) -> None:
    """Strips and vectors are padded: NaN left in scratch by another product must not reach a sum."""
    codes, scales, W = weight(7, 20)
    poisoned = codes, torch.full_like(scales, torch.nan)
    for n, dtype in (
        (1, torch.float32),
        (4, torch.float32),
        (4, torch.bfloat16),
        (5, torch.bfloat16),
    ):
        x, y = torch.randn(n, 20).to(dtype), torch.randn(n, 7).to(dtype)
        for _ in range(4):  # so that scratch of the right size is free
            module.rows.matmul(poisoned, x, 7)
            module.rows.matmul(poisoned, y, 20, True)
        assert bool(module.rows.matmul((codes, scales), x, 7).isfinite().all())
        assert bool(module.rows.matmul((codes, scales), y, 20, True).isfinite().all())
    assert bool(W.isfinite().all())


def test_a_kernel_for_one_row_is_asked_for_one_row_of_a_weight_that_it_takes(
    module: ModuleType,
) -> None:
    from modulora_core.kernels.cpu.cpu_kernels import RowKernels

    asked: list[tuple[int, ...]] = []

    def one_row(_weight: tuple[object, ...], _threads: int, x: Any, y: Any) -> None:
        asked.append(x.shape)
        y[:] = 7

    rows = RowKernels(module.decode, one_row, lambda weight: len(weight[0]) == 6)
    for out_features, n, expected in ((6, 1, True), (6, 2, False), (5, 1, False)):
        codes, scales, _ = weight(out_features, 20)
        y = rows.matmul((codes, scales), torch.randn(n, 20), out_features)
        assert (y.unique().tolist() == [7]) == expected
    rows.matmul(weight(6, 20)[:2], torch.randn(1, 6), 20, True)
    assert asked == [(1, 20)]

    def taken(x: torch.Tensor, transpose: bool = False) -> bool:
        asked.clear()
        given, wanted = (20, 6) if transpose else (6, 20)
        y = rows.product(x, (6, 20), lambda: weight(6, 20)[:2], 4, transpose)
        assert y is None or y.shape == (*x.shape[:-1], given)
        assert (y is None) == (x.shape[-1:] != (wanted,) or x.dtype == torch.float64)
        return asked == [(1, 20)]

    row = torch.randn(20)
    of_gradients = row.clone().requires_grad_()
    for x in (row, row.view(1, 1, 20), of_gradients, row.half(), torch.randn(20, 2)[:, 0]):
        assert taken(x)
    for x in (
        torch.randn(20, 1),
        torch.tensor(1.0),
        row.double(),
        torch.randn(2, 20),
        row.view(2, 10),
    ):
        assert not taken(x)
    assert not taken(torch.randn(6), transpose=True)
    nothing = rows.product(torch.empty(3, 0), (6, 0), lambda: weight(6, 1)[:2], 4, False)
    assert nothing is None


def test_a_decoder_that_rounds_gives_the_bits_that_are_rounded_from_a_scratch(
    module: ModuleType,
) -> None:
    kernels = (module.rows, module.rounding_rows)
    codes, scales, _ = weight(40, 100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(*(rows.tile((codes, scales), (3, 40), 100, dtype) for rows in kernels))
    for dtype in (torch.float32, torch.bfloat16):
        for given, wanted in ((100, 40), (40, 100)):
            x = torch.randn(5, given).to(dtype)
            found = [rows.matmul((codes, scales), x, wanted, given == 40) for rows in kernels]
            assert torch.equal(*found)


def in_another_process(folder: Path) -> str:
    code = (
        "import torch, outsiders_rows as m; w = (torch.ones(4, 4, dtype=torch.int8), torch.ones(4)); "
        "print(m.rows.matmul(w, torch.ones(1, 4), 4).sum().item(), sum(m.rows._few.stats.cache_hits.values()))"
    )
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[3])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.strip()


def test_compiled_products_are_kept_beside_the_decoder_and_follow_its_changes(
    tmp_path: Path,
) -> None:
    file = tmp_path / "outsiders_rows.py"
    file.write_text(DECODER, encoding="utf-8")
    assert in_another_process(tmp_path) == "16.0 0"
    assert list((tmp_path / "__pycache__").glob("outsiders_rows.decode_*_few_*.nbc"))
    assert in_another_process(tmp_path) == "16.0 1"
    file.write_text(DECODER.replace("* scales[row + r]", "* scales[row + r] * 2"), encoding="utf-8")
    assert in_another_process(tmp_path) == "32.0 0"


def test_a_change_in_a_module_beside_the_decoder_is_compiled_too(tmp_path: Path) -> None:
    """numba looks at a kernel's own file alone: a plugin's next release would run with what its last one compiled."""
    (tmp_path / "outsiders_rows.py").write_text(
        "from outsiders_factor import factor\n"
        + DECODER.replace("* scales[row + r]", "* scales[row + r] * factor()"),
        encoding="utf-8",
    )
    beside = tmp_path / "outsiders_factor.py"
    for value, found in ((1, "16.0 0"), (1, "16.0 1"), (3, "48.0 0")):
        beside.write_text(
            f"from modulora_core.kernels import jit\n\n@jit()\ndef factor():\n    return {value}\n",
            encoding="utf-8",
        )
        assert in_another_process(tmp_path) == found
