"""Fixtures of the core's tests: tiny models, small quantizers, and the command line."""

import pytest

from modulora_core.tests.cli.conftest import packed, run, source, text_of  # noqa: F401
from modulora_core.tests.conftest import one_thread, pack, toy, toy_root, tunable  # noqa: F401
from modulora_core.tests.width_quantizer import installed


@pytest.fixture(scope="module")
def widths(tmp_path_factory):
    """The quantizers of any width are installed for the tests of a module."""
    with installed(tmp_path_factory.mktemp("widths-site")):
        yield
