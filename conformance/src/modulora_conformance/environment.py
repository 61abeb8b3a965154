"""Where a run took place: what a report names so that another can repeat it."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "modulora-core",
    "modulora-conformance",
    "torch",
    "transformers",
    "numba",
    "triton",
    "pytest",
    "hypothesis",
)


@cache
def environment() -> dict[str, Any]:
    """Versions of packages (None where one isn't installed), Python, system, processor and accelerators."""
    import torch

    from modulora_conformance.bench.timing import device_name

    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": cuda,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def origin(quantizer: str) -> tuple[str, str]:
    """The distribution that brings a quantizer, and its version; ``("", "")`` where none does."""
    from modulora_core.registry import entries

    for entry in entries():
        if entry.name == quantizer:
            return entry.distribution, entry.version
    return "", ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
