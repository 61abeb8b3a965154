"""Settings of every test run in this repository."""

from __future__ import annotations

import hypothesis
import pytest

# a busy machine makes any example slow, and CI should fail for the same examples every time. The
# zoo fails on purpose, and shrinking its failures takes a minute: "search" shrinks one
UNSHRUNK = set(hypothesis.Phase) - {hypothesis.Phase.shrink, hypothesis.Phase.explain}
hypothesis.settings.register_profile(
    "modulora", deadline=None, derandomize=True, max_examples=50, phases=UNSHRUNK
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=50)
hypothesis.settings.load_profile("modulora")


LONGEST = ("test_docs.py", "test_zoo.py", "test_qtip_conformance.py")
"""The files of tests that take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no process is left alone with one at the end.

    After them come other files with slow tests.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))
