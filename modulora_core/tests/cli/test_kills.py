"""A killed command leaves OUT absent, resumable or complete, and the next run has equal bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modulora_core.tests.killed_runs import COMMANDS, SIGNALS, Works


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    made = Works(tmp_path_factory.mktemp("kills"))
    yield made
    made.commands.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_is_run_again(name: str, works: Works) -> None:
    for number, after in zip(SIGNALS, (0.4, 0.6, 0.8), strict=True):
        works.kill(name, number, after)
