"""L9: what the calls of all checks before did beside their results."""

from __future__ import annotations

import pytest

from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.memory import GROWTH, KEPT
from modulora_conformance.levels.packing import GLOBALS
from modulora_conformance.levels.products import ALONE, FORWARD, TRANSPOSED
from modulora_conformance.levels.real_products import REAL_LAYER
from modulora_conformance.watching import findings_of


class Watched(Level):
    """No call of any check changes its arguments or the process, or keeps a dense weight."""

    level, title = "L9", "every call"

    @needs(FORWARD, TRANSPOSED, LOOKUP, *ALONE, "test_the_input_is_unchanged")
    def test_no_call_of_any_check_changed_its_arguments(self, quantizer, request):  # noqa: ARG002
        """If this fails: at some size, dtype or option a call writes to x, W, H or packed tensors.

        The message names the check and the call. Work in memory of your own.
        """
        _fail_by(findings_of(request.node).arguments)

    @needs(FORWARD, TRANSPOSED, LOOKUP, GLOBALS, "test_reading_leaves_global_state_alone")
    def test_no_call_of_any_check_changed_the_process(self, quantizer, request):  # noqa: ARG002
        """If this fails: at some size, dtype or option a call changes a setting, or prints.

        Settings of torch, numpy and Python, the environment, folders, open files and the random
        state are the user's.
        """
        _fail_by(findings_of(request.node).process)

    @needs(FORWARD, TRANSPOSED, LOOKUP, KEPT, GROWTH, REAL_LAYER)
    def test_no_call_of_any_check_kept_a_dense_weight(self, quantizer, request):  # noqa: ARG002
        """If this fails: at some size a decoded weight, or much of one, outlives a call.

        A quarter of a weight of half a million elements or more is much. Keep nothing that is made
        for one weight.
        """
        _fail_by(findings_of(request.node).memory)


def _fail_by(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(found), pytrace=False)
