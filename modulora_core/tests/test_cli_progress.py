"""The progress bar: sizes where bytes are counted, and a rate and a time left of the work that goes on."""

from __future__ import annotations

import io
import time

from rich.console import Console

from modulora_core.cli.progress import Bar


def test_bytes_are_shown_as_sizes() -> None:
    shown = io.StringIO()
    with Bar(
        Console(file=shown, force_terminal=True, width=120), "reading", unit="bytes", total=None, shown=True
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
        Console(file=shown, force_terminal=True, width=120), "reading", unit="bytes", total=None, shown=True
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
