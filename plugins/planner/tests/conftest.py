"""Fixtures of the core's tests: tiny models, the toy quantizer, and the command line."""

from modulora_core.tests.cli.conftest import packed, run, source, text_of  # noqa: F401
from modulora_core.tests.conftest import one_thread, pack, toy, toy_root, tunable  # noqa: F401
