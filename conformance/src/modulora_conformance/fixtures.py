"""Fixtures for a plugin's own tests. Import them in its ``conftest.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from modulora_core import kernels
from modulora_core.kernels import loading


@pytest.fixture
def generator() -> torch.Generator:
    """Draws the same numbers in each test."""
    return torch.Generator().manual_seed(0)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn CPU kernels off until the test ends, so that plain torch runs."""
    for module in (kernels, loading):  # a plugin calls the first, KernelQuantizer the second
        monkeypatch.setattr(module, "load", lambda module, device: None)  # noqa: ARG005


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns CPU kernels off, so that plain torch runs."""
    without_kernels(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Uses one thread: in small products, torch's threads and numba's wait for each other."""
    with kernels.one_thread():
        yield
