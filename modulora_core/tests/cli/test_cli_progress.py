"""The progress bar, and the lines that replace it where nobody watches."""

import io
import re
import sys
import time

import pytest

from modulora_core.cli.terminal import Terminal


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


def test_a_bar_shows_rate_and_sizes_and_starts_again_for_other_work(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for unit, total, count, rate in (
        ("bytes", 13_500_000_000, "4.0/13.5 GB", "B/s"),
        ("layers", 135, "40/135", " layers/s"),
    ):
        screen = Screen()
        with Terminal(stderr=screen).progress("reading", unit) as show:
            for part, drawn in ((0, "checking"), (0.2963, count), (1.0, rate)):
                show("checking", round(part * total), total)
                wait_until(screen, drawn)
                time.sleep(0.2)  # a rate needs time between states
            show("packing [x]", 1, total)
        shown = screen.getvalue()
        assert count in shown
        assert rate in shown
        last = shown[shown.rindex("packing [x]") :]
        assert "--:--" in last, "the time left belongs to other work"


def wait_until(screen, text):
    """A thread draws ten times a second, and less often on a busy machine."""
    end = time.monotonic() + 60
    while text not in screen.getvalue():
        assert time.monotonic() < end, text
        time.sleep(0.02)


@pytest.fixture
def clock(monkeypatch):
    """``clock[0]`` is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr("modulora_core.cli.terminal.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("json", [False, True])
def test_without_a_terminal_a_line_comes_at_most_once_a_minute(clock, json):
    stdout, stderr = io.StringIO(), io.StringIO()
    terminal = Terminal(json=json, stdout=stdout, stderr=stderr)
    with terminal.progress("training", "steps") as show:
        for step in range(1, 9):
            clock[0] += 20
            show(f"training, loss [{step}]", step, 8)
    assert stderr.getvalue() == "training, loss [3]: 3/8 steps\ntraining, loss [6]: 6/8 steps\n"
    assert stdout.getvalue() == ""


def test_a_spinner_turns_until_a_bar_or_output_comes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen, stdout = Screen(), io.StringIO()
    terminal = Terminal(stdout=stdout, stderr=screen)

    def added():
        text = screen.getvalue()
        screen.seek(0)
        screen.truncate()
        return text

    with terminal.active(), terminal.working():
        assert "working" in added()
        terminal.note("a note stands above it")
        assert re.search("a note stands above it.*working", added(), re.DOTALL)
        with terminal.progress("packing", "layers") as show:
            show("packing", 1, 2)
            added()
            time.sleep(0.2)  # longer than a refresh
            assert "working" not in added()
        added()
        wait_until(screen, "working")  # it turns again after the bar
        added()
        print("a library's line", file=sys.stderr)
        assert "working" not in added().rpartition("\r")[2]
        terminal.write("an answer")
        time.sleep(0.2)
        assert added() == ""
    assert added() == ""
    assert stdout.getvalue() == "an answer"
