"""The plugin of the core's tests, whose folders are converted."""

from modulora_core.tests.conftest import toy, toy_root  # noqa: F401
