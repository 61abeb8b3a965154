"""A killed command leaves OUT absent, resumable or complete, and the next run has equal bytes."""

import pytest

from modulora_core.tests.killed_runs import COMMANDS, SIGNALS, Works


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    made = Works(tmp_path_factory.mktemp("kills"))
    yield made
    made.commands.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_is_run_again(name, works):
    for number, after in zip(SIGNALS, (0.4, 0.6, 0.8), strict=True):
        works.kill(name, number, after)
