"""The order of a run over everything: files with a slow test first, so that no process is left alone with one at the end.

pytest-xdist gives files to its processes in this order (``--no-loadscope-reorder``; by itself it would give those with the fewest tests
last, which are the longest).
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable: within a file nothing changes
