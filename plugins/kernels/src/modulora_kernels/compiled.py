"""Import and compile a plugin's kernels where they can run: numba's on a CPU, Triton's on a GPU."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from modulora_core.errors import lacks_memory

_HERE = Path(__file__).parent

_MISSING = {
    "numba": "the CPU kernels of quantizers: plain torch runs instead, tens of times slower. "
    "To get them: pip install numba",
    "triton": "the GPU kernels of quantizers: plain torch runs instead, slower and with more "
    "memory. To get them: reinstall torch for your GPU, or pip install triton",
}


LEAST_CAPABILITY = (8, 0)
"""The compute capability of NVIDIA's GPUs from which Triton supports them: Ampere's."""

_WRONG: set[tuple[str, str]] = set()
"""Packages and types of devices whose kernels gave wrong values in this process."""

_PLAIN: ContextVar[bool] = ContextVar("plain torch", default=False)
_USED: ContextVar[set[str] | None] = ContextVar("packages of kernels", default=None)


@cache  # a layer asks for each token
def load(module: str, device: torch.device) -> ModuleType | None:
    """A module of numba kernels; None off the CPU, and without numba.

    Without numba on a CPU a process warns once.
    """
    if device.type != "cpu" or _compiler("numba") is None:
        return None
    return importlib.import_module(module)


@cache
def load_triton(module: str, device: torch.device) -> ModuleType | None:
    """A module of Triton kernels; None where they can't run.

    They run on CUDA devices, as torch calls AMD's too, and in Triton's interpreter on a CPU.
    Without Triton on a CUDA device, and on a GPU that Triton does not support, a process warns
    once.
    """
    on_gpu = device.type == "cuda" or (device.type == "cpu" and triton_is_interpreted())
    if not on_gpu or _compiler("triton") is None or not _is_supported(device):
        return None
    return importlib.import_module(module)


@cache
def _is_supported(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        message = (
            f"{device}: expected compute capability {LEAST_CAPABILITY} for the GPU kernels of "
            f"quantizers, got {found}: plain torch runs instead, slower and with more memory"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return found >= LEAST_CAPABILITY


def for_device(package: str, device: torch.device) -> ModuleType | None:
    """A package's module for a device: ``gpu``, ``cpu``, or None to run plain torch.

    The package may lack either module. Kernels that gave wrong values there (:func:`stop_using`)
    are not used.
    """
    if _PLAIN.get() or (package, device.type) in _WRONG:
        return None
    module: ModuleType | None = None
    if _exists(f"{package}.gpu"):
        module = load_triton(f"{package}.gpu", device)
    if module is None and _exists(f"{package}.cpu"):
        module = load(f"{package}.cpu", device)
    if module is not None and (used := _USED.get()) is not None:
        used.add(package)
    return module


@contextmanager
def plain_torch() -> Iterator[None]:
    """Let :func:`for_device` return no kernels, to compute what they are compared with."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


@contextmanager
def packages_used() -> Iterator[set[str]]:
    """Give the set of packages whose kernels :func:`for_device` returned meanwhile."""
    used: set[str] = set()
    token = _USED.set(used)
    try:
        yield used
    finally:
        _USED.reset(token)


def stop_using(packages: Iterable[str], device: torch.device) -> None:
    """Use plain torch instead of these packages' kernels on this type of device, until the end."""
    _WRONG.update((package, device.type) for package in packages)


@cache
def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def triton_is_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for the interpreter, in Triton's words for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _compiler(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if lacks_memory(error):
            raise
        message = f"{name} can't be imported ({error}). It compiles {_MISSING[name]}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return None


def jit(
    *,
    parallel: bool = False,
    fastmath: tuple[str, ...] = (),
    borrows: bool = False,
    cache: bool = True,
) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` for a kernel: compiled once, cached on disk, run without the GIL.

    numba caches beside the module, or in the user's cache folder. A change in any module of the
    plugin's package, or of this toolkit, compiles again.

    Args:
        parallel: whether ``prange`` runs on threads.
        fastmath: LLVM's flags. A decoder must give the reference's bits, so it has none. A sum of a
            product may use ``"reassoc"`` and ``"contract"``.
        borrows: promise that the function makes no array but views, which numba checks. Calls then
            count no references: a tenth of a decoder's time.
        cache: whether to cache on disk.
    """
    import numba

    def decorate(function: Callable[..., Any]) -> Any:
        # the name of numba's cache file
        function.__qualname__ += f"_{_sources(Path(inspect.getfile(function)).parent)}"
        options: dict[str, Any] = {"nogil": True, "parallel": parallel, "_nrt": not borrows}
        options["fastmath"] = set(fastmath)
        try:
            return numba.njit(cache=cache, **options)(function)
        except RuntimeError:  # no folder for the cache can be written
            return numba.njit(**options)(function)

    return decorate


@cache
def _sources(folder: Path) -> str:
    """A hash of this toolkit and of the package that a folder is in."""
    while (folder.parent / "__init__.py").exists() and _HERE not in (folder, *folder.parents):
        folder = folder.parent
    files = sorted({*_HERE.rglob("*.py"), *folder.rglob("*.py")})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
