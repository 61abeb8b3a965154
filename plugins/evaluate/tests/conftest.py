"""The fixtures of the core's tests: a small quantizer, tiny packed models, and the commands."""

from modulora_core.tests.cli.conftest import packed, run, source, text
from modulora_core.tests.conftest import one_thread, toy, toy_root, tunable

__all__ = ["one_thread", "packed", "run", "source", "text", "toy", "toy_root", "tunable"]
