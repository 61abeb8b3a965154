from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import modulora_core
from modulora_core import cli
from modulora_core.cli import app, main

HEAVY = ("torch", "numpy", "transformers")

PROBE = '''
"""A command that does what it is told."""
import os, sys, time, warnings
from typing import Annotated
import typer
from modulora_core.cli.arguments import ByteSize, QuantizerOptions
from modulora_core.cli.terminal import Report, terminal
from modulora_core.errors import OptionError, WorkError

def command(
    how: str, options: QuantizerOptions = [], budget: ByteSize = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
) -> Report:
    """Do something, on [out, in] weights.

    Prose [as 90%:] that is wrapped
    in the source.

    Examples:
      modulora probe well --budget 1GiB [at 90%]
    """
    if how == "refuse":
        raise OptionError("option 'rank' of probe: expected 1 or more, got 0")
    if how == "fail":
        raise WorkError("the work failed")
    if how == "crash":
        raise ZeroDivisionError("1 / 0\\nin two lines")
    if how == "doomed":
        error = RuntimeError("boom")
        error.add_note("packing x, by alpha")
        raise error
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "wait":
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(60)
    if how == "noise":
        print("from print")
        os.system("echo from a child process")
        warnings.warn("from warnings")
        terminal().note("from note")
        terminal().write("from write\\n")
    with terminal().progress("working", unit="layers", total=3) as bar:
        for done in range(3):
            bar.update(done + 1, 3)
    nan = float("nan")
    found = {"how": how, "options": options, "budget": budget, "rank": rank, "loss": nan, "losses": [nan, 1]}
    return Report(found, f"did {how}" + " and so on" * (100_000 if how == "much" else 0))
'''

DRIVER = """
import signal, sys
from modulora_core import cli
from modulora_core.cli import app
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script inherits it ignored
cli.__path__.append({folder!r})
app.COMMANDS += ("probe",)
sys.exit(cli.main())
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the command ``probe`` to this process's command line."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    monkeypatch.setattr(app, "COMMANDS", (*app.COMMANDS, "probe"))
    app.load_command.cache_clear()
    yield
    sys.modules.pop("modulora_core.cli.probe", None)
    app.load_command.cache_clear()


def probe_process(tmp_path: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    (tmp_path / "probe.py").write_text(PROBE)
    code = DRIVER.format(folder=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, "probe", *words], **{**pipes, **options})


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


# --- results ---------------------------------------------------------------------------------------------


def test_a_report_is_text_without_json_and_one_object_with_it(
    probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "well", "-o", "a=1", "-o", "b=2", "--budget", "1KiB"]) == 0
    assert capsys.readouterr().out == "did well\n"
    assert main(["probe", "well", "-o", "a=1", "-o", "b=2", "--budget", "1KiB", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["options"] == ["a=1", "b=2"]
    assert json.loads(printed.out)["budget"] == 1024
    assert printed.err == ""


def test_numbers_that_json_does_not_have_are_null(
    probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["probe", "well", "--json"])
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (printed["loss"], printed["losses"]) == (None, [None, 1])


def test_under_json_everything_else_goes_to_stderr(tmp_path: Path) -> None:
    out, err = probe_process(tmp_path, "noise", "--json").communicate(timeout=60)
    assert json.loads(out)["how"] == "noise"
    for line in ("from print", "from a child process", "warning: from warnings", "from note"):
        assert line in err.splitlines()
    assert "from write" not in out + err


def test_without_json_streamed_text_goes_to_stdout_and_notes_to_stderr(tmp_path: Path) -> None:
    out, err = probe_process(tmp_path, "noise").communicate(timeout=60)
    assert "from write" in out.splitlines()
    assert err.splitlines() == ["warning: from warnings", "from note"]


def test_progress_is_silent_where_stderr_is_no_terminal(
    probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["probe", "well"])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_shows_rate_and_count_on_a_terminal(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = probe_process(tmp_path, "well", stderr=theirs, env=environment)
    process.communicate(timeout=60)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "working" in shown
    assert "3/3" in shown
    assert "layers/s" in shown


# --- failures --------------------------------------------------------------------------------------------

FAILURES = {
    "a wrong request": (
        "refuse",
        2,
        "OptionError",
        "option 'rank' of probe: expected 1 or more, got 0",
    ),
    "failed work": ("fail", 1, "WorkError", "the work failed"),
    "a bug": (
        "crash",
        1,
        "ZeroDivisionError",
        "unexpected ZeroDivisionError: 1 / 0 in two lines; run again with --debug for the traceback",
    ),
    "a plugin's": (
        "doomed",
        1,
        "RuntimeError",
        "unexpected RuntimeError: boom (packing x, by alpha); run again with --debug for the traceback",
    ),
}


@pytest.mark.parametrize(("how", "code", "kind", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_is_one_sentence_and_an_exit_code(
    probe: None, capsys: pytest.CaptureFixture[str], how: str, code: int, kind: str, message: str
) -> None:
    assert main(["probe", how]) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"error: {message}\n")
    assert main(["probe", how, "--json"]) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": {"kind": kind, "message": message}}
    assert printed.err == f"error: {message}\n"


def test_debug_shows_the_traceback(probe: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "crash", "--debug"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert 'raise ZeroDivisionError("1 / 0' in printed


USAGE = {
    "an unknown command": (["prob"], "no such command: 'prob'; did you mean probe?"),
    "a command like no other": (["xyz"], "no such command: 'xyz'; expected one of "),
    "an unknown option": (
        ["probe", "well", "--rnak", "1"],
        "no such option: --rnak; did you mean --rank?",
    ),
    "a missing argument": (["probe"], "missing argument"),
    "an argument too many": (["probe", "well", "again"], "again"),
    "a value of another type": (["probe", "well", "--rank", "many"], "invalid value for '--rank'"),
    "a value out of range": (["probe", "well", "--rank", "0"], "invalid value for '--rank'"),
    "a size that isn't one": (["probe", "well", "--budget", "24 gigs"], "such as 24GiB"),
    "an option without its value": (["probe", "well", "--rank"], "'--rank' requires"),
}


@pytest.mark.parametrize(("words", "message"), USAGE.values(), ids=USAGE.keys())
def test_a_usage_error_is_one_sentence_and_exit_code_2(
    probe: None, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert told.count("\n") == 1
    assert main(["--json", *words]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "UsageError"
    assert message in error["message"]


def test_options_without_a_command_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"].startswith("missing command")


def test_a_literal_argument_that_looks_like_a_flag_is_none(
    probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--", "--json"]) == 0
    assert capsys.readouterr().out == "did --json\n"


def test_an_interrupt_ends_with_one_word_and_130(
    probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "interrupt"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a POSIX signal")
def test_ctrl_c_ends_a_process_with_one_word_and_130(tmp_path: Path) -> None:
    with probe_process(tmp_path, "wait") as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # nothing is left where it has ended
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pipe")
@pytest.mark.parametrize("words", [["much"], ["much", "--json"], ["--help"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = probe_process(tmp_path, *words, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")


# --- help ------------------------------------------------------------------------------------------------


def test_every_command_has_a_module_and_every_module_with_a_command_is_listed() -> None:
    modules = {name for _, name, _ in pkgutil.iter_modules(cli.__path__)} - {"__main__"}
    with_command = {
        name.replace("_", "-")
        for name in modules
        if hasattr(importlib.import_module(f"modulora_core.cli.{name}"), "command")
    }
    assert with_command == set(app.COMMANDS)


@pytest.mark.parametrize("name", app.COMMANDS)
def test_the_help_of_a_command_has_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    command = app.load_command(name)
    docstring = importlib.import_module(
        f"modulora_core.cli.{name.replace('-', '_')}"
    ).command.__doc__
    examples = re.findall(rf"^\s+(?:\w+=\S+ )*modulora {name}\b.*", docstring, flags=re.MULTILINE)
    assert examples, f"the docstring of {name} has no examples"
    for example in examples:
        words = shlex.split(example, comments=True)
        # raises a usage error when the example names an option that isn't there
        command.make_context(name, words[words.index(name) + 1 :])
    assert shown.count(f"modulora {name}") > len(examples)  # the usage line has it too


@pytest.mark.parametrize(
    "words", [[], *[[name] for name in app.COMMANDS]], ids=lambda words: " ".join(words)
)
def test_help_imports_nothing_heavy(
    words: list[str], record_property: pytest.RecordProperty
) -> None:
    code = f"""
        import sys
        from modulora_core.cli import main
        code = main({[*words, "--help"]!r})
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        sys.exit(f"imported {{heavy}}" if heavy else code)
    """
    began = time.perf_counter()
    result = python("-c", dedent(code))
    record_property(
        "seconds", time.perf_counter() - began
    )  # reported, not asserted: the machine may be busy
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_help_joins_wrapped_prose_keeps_examples_and_takes_brackets_literally(
    probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--help"]) == 0
    lines = [line.strip(" \n") for line in capsys.readouterr().out.splitlines()]
    assert "Do something, on [out, in] weights." in lines
    assert "Prose [as 90%:] that is wrapped in the source." in lines
    assert lines[lines.index("Examples:") + 1] == "modulora probe well --budget 1GiB [at 90%]"


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "list-quantizers" in capsys.readouterr().out


def test_version_and_the_module_are_the_same_program() -> None:
    result = python("-m", "modulora_core.cli", "--version")
    assert (result.returncode, result.stdout) == (0, f"modulora {modulora_core.__version__}\n")
