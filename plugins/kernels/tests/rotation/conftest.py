"""Fixtures of the rotations' tests: plain torch, and one thread."""

from modulora_conformance.fixtures import one_thread, plain_torch  # noqa: F401
