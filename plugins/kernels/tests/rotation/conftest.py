"""Fixtures of the rotations' tests: plain torch, and one thread."""

import modulora_kernels as kernels
import pytest
from modulora_conformance.fixtures import without_kernels


@pytest.fixture
def plain_torch(monkeypatch):
    without_kernels(monkeypatch)


@pytest.fixture
def one_thread():
    with kernels.one_thread():
        yield
