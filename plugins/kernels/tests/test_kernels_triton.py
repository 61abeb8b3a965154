"""Triton's tools, by a small format: a weight is its codes over eight."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import modulora_kernels as kernels
import pytest
import torch
from modulora_conformance.fake_device import fake_cuda, moved
from modulora_kernels import compiled

MINE = """
import triton
import triton.language as tl
from modulora_kernels.triton.blocks import block

@triton.jit
def decode(
    weight, row, col, out_features, in_features,
    OPTIONS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    at, inside = block(row, col, out_features, in_features, BLOCK_OUT, BLOCK_IN)
    return tl.load(weight[0] + at, mask=inside, other=0).to(tl.float32) / OPTIONS
"""

CODES = """
import torch
import modulora_kernels as kernels
from modulora_kernels.triton.products import Cut, few_rows, multiply
from modulora_kernels.triton.tiles import write_tile

mine = kernels.load_triton("mine", torch.device("cpu"))
generator = torch.Generator().manual_seed(0)
codes = torch.randint(-128, 128, (19, 45), generator=generator).to(torch.int8)
W = codes.double() / 8  # values and sums of few of them are exact in every dtype but bf16
"""


@pytest.fixture
def run(tmp_path):
    """Run code in a process of its own that finds the module ``mine``."""
    pytest.importorskip("triton")
    (tmp_path / "mine.py").write_text(MINE)

    def python(code, **environment):
        path = os.pathsep.join([str(tmp_path), str(Path(kernels.__file__).parents[2])])
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True, text=True, timeout=300, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return python


def test_tiles_and_products_of_a_format_are_exact(run):
    """In the interpreter; fp32 holds every sum: a whole number of eighths below 2²¹."""
    run(
        CODES
        + """
for rows, columns in (
    ((0, 19), (0, 45)), ((7, 9), (0, 45)), ((18, 19), (33, 45)), ((5, 5), (0, 45))
):
    out = torch.full((rows[1] - rows[0], columns[1] - columns[0]), torch.nan)
    write_tile(mine.decode, (codes,), out, rows, (19, 45), 8, columns=columns)
    assert torch.equal(out.double(), W[slice(*rows), slice(*columns)]), (rows, columns)
for transpose, w in ((False, W.T), (True, W)):
    for n in (1, 2, 16, 17, 32):
        for dtype in (torch.float32, torch.float16):
            x = torch.randint(-8, 9, (n, len(w)), generator=generator).to(dtype)
            for cut in (None, Cut(16, 16)):  # of one share, and of several
                y = multiply(mine.decode, (codes,), x, (19, 45), 8, transpose=transpose, cut=cut)
                assert torch.equal(y, (x.double() @ w).to(dtype)), (transpose, n, dtype, cut)
""",
        TRITON_INTERPRET="1",
    )


def test_kernels_run_on_cpu_tensors_only_in_the_interpreter():
    assert not kernels.triton_is_interpreted(), "this process must not be interpreted"
    assert kernels.load_triton("no.such.module", torch.device("cpu")) is None
    assert kernels.load_triton("no.such.module", torch.device("meta")) is None


def test_triton_is_imported_when_kernels_are_and_its_absence_is_said_once(run):
    told = run("""
        import sys, warnings
        import torch
        import modulora_kernels as kernels
        assert "triton" not in sys.modules
        sys.modules["triton"] = None  # as if it weren't installed
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert kernels.load_triton("mine", torch.device("cuda")) is None
            assert kernels.load_triton("other", torch.device("cuda")) is None
        print(len(told), told[0].message)
    """)
    assert told.startswith("1 triton")
    assert "pip install triton" in told


def test_a_launch_with_tensors_of_two_devices_is_refused():
    """A kernel would read another GPU's memory, or the host's, at the wrong address."""
    pytest.importorskip("triton")
    from modulora_kernels.triton.launching import launch, recorded
    from modulora_kernels.triton.tiles import tile_kernel

    with fake_cuda(), recorded() as calls:
        weight, x = moved(torch.ones(4)), torch.ones(4)
        with pytest.raises(RuntimeError, match=r"one device, got cpu, cuda:0; move x"):
            launch(tile_kernel, lambda _: (1,), (x, (weight,)), {})
        launch(tile_kernel, lambda _: (1,), (moved(x), (weight, 3)), {})
    assert len(calls) == 1


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_plain_torch_runs_on_gpus_that_triton_does_not_support(capability, runs, recwarn):
    pytest.importorskip("triton")
    compiled._is_supported.cache_clear()
    load = compiled.load_triton.__wrapped__  # without its cache
    with fake_cuda(capability=capability):
        module = load("modulora_kernels.triton.tiles", torch.device("cuda", 0))
    compiled._is_supported.cache_clear()
    assert (module is not None) == runs
    warned = [str(each.message) for each in recwarn]
    assert [text for text in warned if "got (7, 5): plain torch runs instead" in text] == warned
    assert len(warned) == (not runs)
