"""``modulora doctor``."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from modulora_conformance.commands import check_gpu
from modulora_conformance.findings import Finding, reason, report_of
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import format_size

if TYPE_CHECKING:
    from modulora_core.registry import Entry
    from modulora_core.spec import QuantizerSpec

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "peft", "trl", "bitsandbytes")
EXTRAS = {"data": "datasets", "plots": "matplotlib"}
LEAST_DISK = 10 * 2**30
SHAPE = (192, 512)
"""Out and in features of the weight of a self-test, before it is made to fit the quantizer."""

LARGEST_ERROR = 1e-4
"""Of a product in fp32 beside the product with Ŵ in fp64, relative to its norm."""

LONG = 3.0
"""Seconds of a self-test that are mostly compilation."""

Devices = Annotated[
    list[str], option("--device DEVICE", "Test plugins there. Repeatable.", default="cpu, and cuda")
]


GPU = Annotated[bool, option("--gpu", "Run `modulora check-gpu` too, with the same --device.")]


def command(device: Devices = [], gpu: GPU = False) -> Report:
    """Check this machine and each installed quantizer, and say how to mend what is wrong.

    It prints versions, devices, memory, disk and caches. Each quantizer packs a small weight, and
    its product is compared with the product of its own tiles. The exit code is 1 if something
    fails. Paste the report into an issue.

    Examples:
        modulora doctor
        modulora doctor --device cuda --json
        modulora doctor --gpu
    """
    found = list(_machine())
    import torch  # after the checks that name it if it is missing

    from modulora_core.distributed import pick_device

    devices = device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    for name in devices:
        pick_device(name)
    measured = list(check_gpu.findings(device)) if gpu else []
    found += _compilers(torch)
    found += _caches()
    from modulora_core.registry import entries

    plugins = entries()
    with terminal().progress("testing", "quantizers") as show:
        for done, entry in enumerate(plugins):
            show(f"testing {entry.name}", done, len(plugins))
            found += _plugin(entry, devices)
            show(f"tested {entry.name}", done + 1, len(plugins))
    if not plugins:
        found.append(Finding("quantizers", "none", "fault", "install a plugin; README lists them"))
    return report_of([*found, *measured])


def _machine() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding(
        "Python", f"{platform.python_version()}, {platform.system()} {platform.release()}",
        "fault" if old else "ok", "install Python 3.11 or newer" if old else "",
    )  # fmt: skip
    yield Finding("processor", f"{platform.machine()}, {os.cpu_count()} cores")
    for name in ("modulora-core", *LIBRARIES):
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            if name in LIBRARIES[:4]:
                yield Finding(name, "missing", "fault", f"pip install {name}")
    if (memory := _memory()) is not None:
        yield Finding("memory", f"{format_size(memory)} in all")
    free = shutil.disk_usage(Path.cwd()).free
    low = free < LEAST_DISK
    yield Finding(
        "disk", f"{format_size(free)} free here", "note" if low else "ok",
        "packed models need 1 to 40 GiB: free some, or work in another folder" if low else "",
    )  # fmt: skip


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has neither name
        return None


def _compilers(torch: Any) -> Iterator[Finding]:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", f"{card.name}, {format_size(card.total_memory)}")
    else:
        built = "built for CUDA" if torch.version.cuda else "built for CPUs"
        yield Finding("GPU", f"none that torch sees; torch is {built}")
    for name, of in (("numba", "CPU"), ("triton", "GPU")):
        there = importlib.util.find_spec(name) is not None
        needed = name == "numba" or torch.cuda.is_available()
        if there:
            yield Finding(name, version(name))
        elif needed:
            yield Finding(
                name, "missing", "note", f"pip install {name}; without it {of} kernels do not run"
            )
    for extra, module in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                module, "missing", "note", f"pip install 'modulora-core[{extra}]', if you need it"
            )


def _caches() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from modulora_core.quantization.cache import cache_folder

    for subject, folder in (("Hub cache", Path(HF_HUB_CACHE)), ("packed models", cache_folder())):
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = os.access(parent, os.W_OK)
        yield Finding(
            subject, str(folder), "ok" if writable else "fault",
            "" if writable else f"make {parent} writable, or set HF_HOME to another folder",
        )  # fmt: skip


def _plugin(entry: Entry[QuantizerSpec], devices: list[str]) -> Iterator[Finding]:
    subject = f"{entry.name} ({entry.origin})"
    if entry.status != "ok":
        advice = f"{entry.reason}; update or remove {entry.distribution}"
        yield Finding(subject, entry.status, "note" if entry.status == "blocked" else "fault",
                      advice if entry.status != "blocked" else "")  # fmt: skip
        return
    for device in devices:
        started = time.perf_counter()
        where = subject if device == "cpu" else f"{subject} on {device}"
        try:
            error = _self_test(entry.name, device)
            first = time.perf_counter() - started
            if first > LONG:  # it compiled kernels
                _self_test(entry.name, device)
        except Exception as failure:  # of a plugin, which may raise anything
            advice = f"{reason(failure)}; reinstall {entry.distribution}"
            yield Finding(where, "fails", "fault", advice)
            continue
        seconds = f"{first:.1f} s"
        if first > LONG:
            again = time.perf_counter() - started - first
            seconds = f"{again:.1f} s after {first - again:.0f} s of compiling kernels, once"
        if math.isfinite(error) and error <= LARGEST_ERROR:
            yield Finding(where, f"works, error of a product {error:.0e}, {seconds}")
        else:
            yield Finding(
                where, f"wrong, error of a product {error:.0e}", "fault",
                f"expected at most {LARGEST_ERROR:.0e}; run: modulora conformance {entry.name}",
            )  # fmt: skip


def _self_test(name: str, device: str) -> float:
    """The largest relative error of products in fp32, in both directions and for few and many
    rows, beside the same products with the CPU's tiles in fp64."""
    import torch

    from modulora_conformance.packed_noise import accepted, packed_noise
    from modulora_core.registry import create

    quantizer = create(name)
    packed = packed_noise(quantizer, accepted(quantizer, SHAPE))
    exact = quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float64)
    packed, generator = packed.to(device), torch.Generator().manual_seed(1)
    errors = []
    for rows in (1, 7, 80):
        for transpose in (False, True):
            x = torch.randn(rows, exact.shape[0 if transpose else 1], generator=generator)
            expected = x.double() @ (exact if transpose else exact.t())
            y = quantizer.matmul(x.to(device), packed, transpose).cpu().double()
            errors.append((y - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())  # NaN if one is NaN, unlike Python's max
