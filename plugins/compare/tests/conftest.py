"""The fixtures of the core's tests: a small quantizer, a packed Llama, and runs on it."""

from modulora_core.tests.cli.conftest import run
from modulora_core.tests.conftest import one_thread, toy, toy_root, tunable
from modulora_core.tests.training.conftest import configure, text

__all__ = ["configure", "one_thread", "run", "text", "toy", "toy_root", "tunable"]
