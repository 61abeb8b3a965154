"""Settings of every test run in this repository."""

from __future__ import annotations

import hypothesis
import pytest

# a busy machine makes any example slow, and CI should fail for the same examples every time
hypothesis.settings.register_profile("modulora", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("search", deadline=None, max_examples=50)
hypothesis.settings.load_profile("modulora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
