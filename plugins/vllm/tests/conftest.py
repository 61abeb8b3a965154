"""The core's tiny models, packed with its quantizer for tests."""

from modulora_core.tests.conftest import pack, toy, toy_root  # noqa: F401
