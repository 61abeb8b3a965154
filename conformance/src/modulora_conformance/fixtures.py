"""Fixtures for a plugin's own tests: ``from modulora_conformance.fixtures import generator, plain_torch`` in its ``conftest.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from modulora_core import kernels


@pytest.fixture
def generator() -> torch.Generator:
    """Of the same numbers in each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that runs where no CPU kernel can."""
    monkeypatch.setattr(kernels, "load", lambda module, device: None)  # noqa: ARG005 - load's own names


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small products: torch's threads and numba's would wait for each other's cores."""
    with kernels.one_thread():
        yield
