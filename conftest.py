"""Settings of every test run in this repository."""

from __future__ import annotations

import gc
import re
from typing import Any

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


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> None:
    """Let garbage collection skip all objects that the libraries made at their import.

    transformers collects garbage in each training, which took nearly half of a small run's time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else Triton reports the objects as leaked


PLUGIN = re.compile("plugins/[^/]+/")

LONGEST = ("test_zoo.py", "test_docs.py", "test_plan_truth.py")
"""The files of tests that take minutes."""


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run all tests of a plugin.

    It compiles each kernel once, and keeps the code on disk for the tests after it. Two processes
    would compile the same kernels at the same time, for minutes. Marks of groups (`--dist
    loadgroup`) would do the same, but rename tests, which the kit's reports identify by name.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadPluginScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            plugin = PLUGIN.match(nodeid)
            return super()._split_scope(nodeid) if plugin is None else plugin[0]

    return LoadPluginScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put plugins and the longest files first, so that no process is alone with one at the end.

    After them come other files with slow tests.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def key(item: pytest.Item) -> tuple[bool, bool, bool]:
        is_plugins = PLUGIN.match(item.nodeid) is not None
        return not is_plugins, item.path.name not in LONGEST, item.path not in slow

    items.sort(key=key)
