"""The fixtures of the core's tests: a small quantizer and a tiny packed Llama."""

from modulora_core.tests.conftest import one_thread, toy, toy_root, tunable

__all__ = ["one_thread", "toy", "toy_root", "tunable"]
