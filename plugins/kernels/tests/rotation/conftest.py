"""Fixtures of the rotations' tests: plain torch, and one thread."""

from __future__ import annotations

from collections.abc import Iterator

import modulora_kernels as kernels
import pytest
from modulora_conformance.fixtures import without_kernels


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with kernels.one_thread():
        yield
