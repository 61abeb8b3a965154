"""Kernels are compiled, kept, launched on torch's threads, and done without where they can't be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.errors import CheckpointError
from modulora_core.packed import PackedWeight, TensorLayout

numba = pytest.importorskip("numba")

KERNELS = """
from numba import prange
from modulora_core.kernels import jit

@jit()
def _twice(x, out):
    for k in range(out.size):
        out[k] = 2 * x[k]

@jit(parallel=True)
def double(x, out):
    for piece in prange((out.size + 999) // 1000):
        _twice(x[piece * 1000 : (piece + 1) * 1000], out[piece * 1000 : (piece + 1) * 1000])

@jit()
def double_often(x, out, running):
    running[0] = 1
    for _ in range(1000):
        _twice(x, out)
    running[0] = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with a module of kernels, as a plugin has one; compiled once for these tests."""
    folder = tmp_path_factory.mktemp("outsider")
    (folder / "outsiders_kernels.py").write_text(KERNELS, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("outsiders_kernels", None)
    kernels.load.cache_clear()


@pytest.fixture(scope="module")
def cpu(folder: Path) -> ModuleType:
    module = kernels.load("outsiders_kernels", torch.device("cpu"))
    assert module is not None
    return module


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own that finds the module of kernels."""
    path = os.pathsep.join([str(folder), str(Path(kernels.__file__).parents[2])])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


DOUBLE = """
    import torch
    from modulora_core import kernels
    cpu = kernels.load("outsiders_kernels", torch.device("cpu"))
    x, out = torch.arange(5.0), torch.empty(5)
    kernels.launch(cpu.double, x, out)
    assert out.tolist() == [0, 2, 4, 6, 8], out
"""


def test_importing_kernels_does_not_import_numba(folder: Path) -> None:
    """If this fails: import numba inside the function that needs it."""
    done = python("import sys, modulora_core.kernels; assert 'numba' not in sys.modules", folder)
    assert done.returncode == 0, done.stderr


def test_a_launched_kernel_writes_to_the_tensors_it_was_given(cpu: ModuleType) -> None:
    x, out = torch.randn(12_345), torch.empty(12_345)
    kernels.launch(cpu.double, x, out)
    assert torch.equal(out, 2 * x)


def test_a_tensor_that_lies_askew_in_a_file_is_read_by_the_same_compiled_kernel(
    cpu: ModuleType,
) -> None:
    """safetensors promises no alignment. If this fails: numba compiles the kernel again for such an array."""
    askew = torch.frombuffer(
        bytearray(b"." + torch.arange(8.0).numpy().tobytes()), dtype=torch.float32, offset=1
    )
    assert askew.data_ptr() % 4 != 0
    out = torch.empty(8)
    kernels.launch(cpu.double, torch.ones(8), out)
    compiled = len(cpu.double.signatures)
    kernels.launch(cpu.double, askew, out)
    assert out.tolist() == [2.0 * k for k in range(8)]
    assert len(cpu.double.signatures) == compiled


@pytest.mark.parametrize("threads", [1, 2, numba.config.NUMBA_NUM_THREADS + 3])
def test_kernels_run_on_as_many_threads_as_torch_and_numba_have(threads: int) -> None:
    before, numbas = torch.get_num_threads(), numba.get_num_threads()
    seen: list[int] = []
    try:
        torch.set_num_threads(threads)
        kernels.launch(lambda: seen.append(numba.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert seen == [min(threads, numba.config.NUMBA_NUM_THREADS)]
    assert numba.get_num_threads() == numbas, "numba's own setting must be left as it was"


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_many_python_threads_may_launch_at_once(folder: Path, layer: str) -> None:
    """workqueue ends the process when it is entered from two threads.

    If this fails: launches must not overlap, and a kernel must not launch another one.
    """
    done = python(
        """
        import sys, threading, torch
        from modulora_core import kernels
        cpu = kernels.load("outsiders_kernels", torch.device("cpu"))
        right = []

        def work(seed):
            x = torch.full((200_000,), float(seed))
            out = torch.empty_like(x)
            for _ in range(100):
                kernels.launch(cpu.double, x, out)
                right.append(bool((out == 2 * seed).all()))

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [w.start() for w in workers]
        [w.join() for w in workers]
        assert len(right) == 400 and all(right)
        """,
        folder,
        NUMBA_THREADING_LAYER=layer,
    )
    if layer == "omp" and "No threading layer could be loaded" in done.stderr:
        pytest.skip("no OpenMP library here")
    assert done.returncode == 0, done.stderr


def test_other_python_threads_run_while_a_kernel_does(cpu: ModuleType) -> None:
    """If this fails: kernels hold the GIL, and a progress bar or a data loader stands still."""
    x, out, running = torch.ones(100_000), torch.empty(100_000), torch.zeros(1)
    flag = running.numpy()  # reading it, unlike a tensor, doesn't let go of the GIL
    kernels.launch(cpu.double_often, x, out, running)  # compiled before it counts
    for _ in range(50):  # on a busy machine this thread may sleep through some
        worker = threading.Thread(target=kernels.launch, args=(cpu.double_often, x, out, running))
        worker.start()
        seen = False
        while worker.is_alive() and not seen:
            seen = flag[0] == 1
        worker.join()
        if seen:
            return
    pytest.fail("this thread never ran inside of a kernel")


def test_compiled_kernels_are_kept_for_the_next_process(cpu: ModuleType, folder: Path) -> None:
    kernels.launch(cpu.double, torch.ones(3), torch.empty(3))  # compiled here, if nothing has yet
    assert list((folder / "__pycache__").glob("outsiders_kernels.double_*.nbc"))
    hits = """
    assert sum(cpu.double.stats.cache_hits.values()) == 1, cpu.double.stats
    assert not cpu.double.stats.cache_misses
    """
    done = python(DOUBLE + hits, folder)
    assert done.returncode == 0, done.stderr


def test_where_no_cache_can_be_written_kernels_are_compiled_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "outsiders_kernels.py").write_text(KERNELS, encoding="utf-8")
    (tmp_path / "__pycache__").write_text(
        "a file where the folder of the cache would be", encoding="utf-8"
    )
    (nowhere := tmp_path / "file").write_text("not a folder", encoding="utf-8")
    done = python(DOUBLE, tmp_path, HOME=str(nowhere), XDG_CACHE_HOME=str(nowhere))
    assert done.returncode == 0, done.stderr


def test_without_numba_there_is_no_module_and_one_warning(folder: Path) -> None:
    """``None`` in sys.modules is how Python itself marks a module that can't be imported."""
    done = python(
        """
        import sys, warnings, torch
        sys.modules["numba"] = None
        from modulora_core import kernels
        cpu = torch.device("cpu")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert kernels.load("outsiders_kernels", torch.device("meta")) is None
            assert not said, "no kernel was missed there"
            for module in ("outsiders_kernels", "another_plugins_kernels", "outsiders_kernels"):
                assert kernels.load(module, cpu) is None
        assert len(said) == 1, said
        assert said[0].category is RuntimeWarning
        assert "pip install numba" in str(said[0].message)
        """,
        folder,
    )
    assert done.returncode == 0, done.stderr


def test_an_error_in_a_plugins_module_is_not_taken_for_a_missing_numba(folder: Path) -> None:
    (folder / "outsiders_mistake.py").write_text("import no_such_module", encoding="utf-8")
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        kernels.load("outsiders_mistake", torch.device("cpu"))


def test_no_kernels_off_the_cpu(folder: Path) -> None:
    assert kernels.load("outsiders_kernels", torch.device("meta")) is None


def outsiders_tensors(shape: tuple[int, int], size: int) -> dict[str, TensorLayout]:
    if size < 1:
        raise ValueError(f"size: expected 1 or more, got {size}")
    return {
        "codes": TensorLayout("uint8", shape),
        "scales": TensorLayout("float32", (shape[0] // size,)),
    }


def outsiders(codes: Tensor, scales: Tensor, **metadata: int) -> PackedWeight:
    return PackedWeight("outsider", 1, (4, 6), {"codes": codes, "scales": scales}, metadata)


CODES, SCALES = torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(2)


def test_tensors_that_are_as_the_metadata_says_are_let_through() -> None:
    kernels.check_tensors(outsiders(CODES, SCALES, size=2), outsiders_tensors)


@pytest.mark.parametrize(
    ("packed", "message"),
    [(outsiders(CODES, SCALES, size=1), r"expected scales as float32 \[4\], got torch.float32 \[2\]"),
     (outsiders(CODES.int(), SCALES, size=2), r"expected codes as uint8 \[4, 6\], got torch.int32 \[4, 6\]"),
     (outsiders(CODES[:3], SCALES, size=2), r"expected codes as uint8 \[4, 6\], got torch.uint8 \[3, 6\]"),
     (PackedWeight("outsider", 1, (4, 6), {"codes": CODES}, {"size": 2}), r"expected scales .* got none"),
     (outsiders(CODES, SCALES, size=0), "size: expected 1 or more, got 0"),
     (outsiders(CODES, SCALES), "missing 1 required positional argument: 'size'"),
     (outsiders(CODES, SCALES, size=2, more=1), "unexpected keyword argument 'more'")],
    ids=["scales too short", "dtype", "codes too short", "missing", "value", "no metadata", "more metadata"],
)  # fmt: skip
def test_tensors_that_are_not_as_the_metadata_says_are_refused(
    packed: PackedWeight, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        kernels.check_tensors(packed, outsiders_tensors)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("rows", [(0, 3000), (17, 2999), (5, 6), (4, 4)], ids=str)
def test_a_filled_tile_is_the_fp32_rows_rounded_once(
    rows: tuple[int, int], dtype: torch.dtype
) -> None:
    """2.4 MB of fp32: whole, it is filled in several pieces where it has to be rounded."""
    whole = torch.randn(3000, 200)

    def fill(start: int, stop: int, out: Tensor) -> None:
        out.copy_(whole[start:stop])

    tile = kernels.filled_tile(fill, rows, 200, dtype)
    assert tile.dtype == dtype
    assert torch.equal(tile, whole[slice(*rows)].to(dtype))


def test_a_tile_that_is_rounded_needs_no_more_scratch_than_a_row_or_the_budget() -> None:
    asked: list[int] = []

    def fill(start: int, stop: int, out: Tensor) -> None:
        asked.append(out.numel() * out.element_size())
        out.zero_()

    kernels.filled_tile(fill, (0, 500), 5000, torch.bfloat16)
    kernels.filled_tile(fill, (0, 2), 10**6, torch.bfloat16)
    assert len(asked) > 3
    assert max(asked[:-2]) <= kernels.ROUNDING_BYTES
    assert asked[-2:] == [4 * 10**6, 4 * 10**6]


def test_the_first_launch_leaves_torchs_number_of_threads_as_it_was(folder: Path) -> None:
    """If this fails: where OMP_NUM_THREADS, or the user, says one thread, torch takes all cores from then on."""
    check = "    assert torch.get_num_threads() == 1, torch.get_num_threads()\n"
    done = python(DOUBLE + check, folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="where OpenMP's library is, is read from /proc"
)
def test_a_launch_leaves_no_teams_of_threads_inside_of_teams(folder: Path) -> None:
    code = (
        DOUBLE
        + """
    import ctypes
    from pathlib import Path
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split(maxsplit=5)[5] for line in maps if "libgomp" in line}
    assert all(ctypes.CDLL(library).omp_get_max_active_levels() == 1 for library in libraries), libraries
    """
    )
    done = python(code, folder)
    assert done.returncode == 0, done.stderr
