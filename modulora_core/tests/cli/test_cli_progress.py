"""The progress bar: sizes where bytes are counted, a rate and a time left of the work that goes on, lines where nobody watches."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from modulora_core.cli.progress import Bar
from modulora_core.cli.terminal import Terminal


def test_bytes_are_shown_as_sizes() -> None:
    shown = io.StringIO()
    with Bar(
        Console(file=shown, force_terminal=True, width=120),
        "reading",
        unit="bytes",
        total=None,
        shown=True,
    ) as bar:
        bar.update(0, 13_500_000_000, "packing")
        time.sleep(0.01)
        bar.update(4_000_000_000)
        time.sleep(0.01)
        bar.update(5_000_000_000)
    assert "5.0/13.5 GB" in shown.getvalue()
    assert "B/s" in shown.getvalue().split("5.0/13.5 GB")[1]


def test_work_that_follows_has_a_time_left_of_its_own() -> None:
    shown = io.StringIO()
    with Bar(
        Console(file=shown, force_terminal=True, width=120),
        "reading",
        unit="bytes",
        total=None,
        shown=True,
    ) as bar:
        for done in (1, 50, 100):
            bar.update(done, 100, "checking")
            time.sleep(0.01)
        task = bar._progress.tasks[0]
        assert task.finished
        for done in (1, 2, 3):  # of the same total, as a model that is checked and then packed has
            bar.update(done, 100, "packing")
            time.sleep(0.01)
        assert not task.finished
        assert task.description == "packing"
        # 1 byte in 10 ms: about a second for 97, and not the few hundredths of the check's rate
        assert task.time_remaining is not None
        assert task.time_remaining > 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``clock[0]`` is what time it is."""
    now = [1000.0]
    monkeypatch.setattr("modulora_core.cli.progress.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("json", [False, True])
def test_where_no_bar_is_shown_a_line_comes_at_most_once_a_minute(
    clock: list[float], json: bool
) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    with Terminal(json=json, stdout=stdout, stderr=stderr).progress(
        "training", unit="steps"
    ) as bar:
        for step in range(1, 9):
            clock[0] += 20
            bar.update(step, 8, f"training, loss [{step}]")
    assert stderr.getvalue() == "training, loss [3]: 3/8 steps\ntraining, loss [6]: 6/8 steps\n"
    assert stdout.getvalue() == ""


def test_lines_know_sizes_and_totals_that_nobody_knows(clock: list[float]) -> None:
    stderr = io.StringIO()
    for unit in ("bytes", "layers"):
        with Terminal(stderr=stderr).progress("reading", unit=unit) as bar:
            clock[0] += 60
            bar.advance(2048)
            clock[0] += 60
            bar.update(4096, 8192)
    assert stderr.getvalue().splitlines() == [
        "reading: 2.00 KiB", "reading: 4.00 KiB/8.00 KiB", "reading: 2048 layers", "reading: 4096/8192 layers",
    ]  # fmt: skip


def test_what_is_done_within_a_minute_says_nothing(clock: list[float]) -> None:
    stderr = io.StringIO()
    with Terminal(stderr=stderr).progress("training", unit="steps", total=2) as bar:
        clock[0] += 59
        bar.advance(2)
    assert stderr.getvalue() == ""
