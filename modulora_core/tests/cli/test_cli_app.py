"""Dispatch, results, errors and help, with a command that is only there for these tests."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

import modulora_core
from modulora_core import registry
from modulora_core.cli import app, main
from modulora_core.cli.failures import report_failure
from modulora_core.cli.terminal import Terminal
from modulora_core.tests.fake_site import FakeSite

PROBE = '''
import logging, os, sys, time, warnings
from typing import Annotated
from modulora_core.cli.arguments import MemoryBudget, QuantizerOptions, Resume, option as declared
from modulora_core.cli.terminal import Report, terminal
from modulora_core.errors import OptionError, WorkError

PANELS = {"Rare": ("rank",)}

def command(
    how: str, option: QuantizerOptions = [], budget: MemoryBudget = None,
    rank: Annotated[int, declared("--rank N", "Rank.", min=1)] = 8,
    names: Annotated[list[str], declared("--names NAME", "Names.")] = [],
    resume: Resume = False,
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
    if how == "exit":
        error = SystemExit(0)
        error.add_note("packing y, by beta")
        raise error
    if how == "wait":
        print("waiting", file=sys.stderr, flush=True)
        time.sleep(600)
    if how == "noise":
        print("from print")
        os.system("echo from a child process")
        warnings.warn("from warnings")
        logging.getLogger("a").warning("from\\n%s", "logging \\x1b[31m")
        print("from a bar \\x1b[1A\\r", file=sys.stderr)
        terminal().note("from note")
        terminal().write("from write\\n")
    with terminal().progress("working", "layers") as show:
        for done in range(3):
            show("working", done + 1, 3)
    nan = float("nan")
    found = {"how": how, "option": option, "budget": budget, "names": names, "losses": [nan, 1]}
    return Report(found, f"did {how}" + " and so on" * (100_000 if how == "much" else 0))
'''

HOOK = """
from modulora_core.hookspecs import CommandSpec, hookimpl

@hookimpl
def modulora_commands():
    return [CommandSpec(name={name!r}, summary="Do something.", panel={panel!r},
                        location="fake_probe:command", protocol={protocol})]
"""

DRIVER = """
import signal, sys
from modulora_core import cli, registry
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
sys.exit(cli.main())
"""


def install_probe(site, name="probe", distribution="fake-probe", **changes):
    """Install a plugin with one command."""
    module = distribution.replace("-", "_") + "_hooks"
    hook = HOOK.format(name=name, **{"panel": "Rare", "protocol": 2, **changes})
    site.install(distribution, {distribution: module}, {module: hook, "fake_probe": PROBE})


@pytest.fixture
def probe(site):
    """Add the command ``probe`` to this process's command line."""
    install_probe(site)
    app.load_command.cache_clear()
    yield site
    app.load_command.cache_clear()


def probe_environment(folder):
    """Install the command ``probe``, and return the environment that has it."""
    site = folder / "site"
    if not site.exists():
        site.mkdir()
        install_probe(FakeSite(site))
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def probe_process(tmp_path, *words, **options):
    """Run the command ``probe`` in its own process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"env": probe_environment(tmp_path), **pipes, **options}
    return subprocess.Popen([sys.executable, "-c", DRIVER, "probe", *words], **options)


def test_a_report_is_text_without_json_and_one_object_with_it(probe, capsys):
    words = ["probe", "well", "-o", "a=1", "-o", "b=2", "--budget", "1KiB", "--names", "x"]
    assert main(words) == 0
    assert capsys.readouterr() == ("did well\n", "")
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out, parse_constant=pytest.fail)
    assert found == {
        "how": "well", "option": ["a=1", "b=2"], "budget": 1024, "names": ["x"],
        "losses": [None, 1],
    }  # fmt: skip
    assert printed.err == ""


@pytest.mark.parametrize(
    ("redirection", "result"),
    [
        (">&-", (0, "", "")),
        ("2>&-", (0, "did caf\\xe9\n", "")),
        ("--json >/dev/full", (1, "", "error: standard output: No space left on device\n")),
        ("2>/dev/full", (0, "did caf\\xe9\n", "")),
    ],
)
def test_any_stdout_and_stderr_will_do(redirection, result, tmp_path):
    command = f"exec {sys.executable} -c {shlex.quote(DRIVER)} probe caf\u00e9 {redirection}"
    ended = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=600, check=False,
        env={**probe_environment(tmp_path), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == result


def test_stdout_has_the_result_alone(tmp_path):
    out, err = probe_process(tmp_path, "noise").communicate(timeout=600)
    assert "from write" in out.splitlines()
    noted = ["warning: from warnings", "warning: from logging", r"from a bar \x1b[1A"]
    assert [line for line in err.splitlines() if line] == [*noted, "from note"]
    out, err = probe_process(tmp_path, "noise", "--json").communicate(timeout=600)
    assert json.loads(out)["how"] == "noise"
    for line in ("from print", "from a child process", *noted, "from note"):
        assert line in err.splitlines()
    assert "from write" not in out + err


FAILURES = {
    "refuse": (2, "OptionError", "option 'rank' of probe: expected 1 or more, got 0"),
    "fail": (1, "WorkError", "the work failed"),
    "crash": (1, "ZeroDivisionError", "unexpected ZeroDivisionError: 1 / 0 in two lines; run again "
              "with --debug for the traceback"),
    "doomed": (1, "RuntimeError", "unexpected RuntimeError: boom (packing x, by alpha); run again "
               "with --debug for the traceback"),
    "exit": (1, "SystemExit", "unexpected exit(0) (packing y, by beta)"),
}  # fmt: skip


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_is_one_sentence_and_an_exit_code(probe, capsys, how):
    code, kind, message = FAILURES[how]
    assert main(["probe", how]) == code
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert main(["probe", how, "--json"]) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": {"kind": kind, "message": message}}
    assert printed.err == f"error: {message}\n"
    assert main(["probe", how, "--debug"]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("Traceback (most recent call last)")
    assert printed.err.endswith(f"error: {message}\n")


USAGE = {
    "prob": "no such command: 'prob'; did you mean probe?",
    "xyz": "no such command: 'xyz'; expected one of ",
    "probe well --rnak 1": "no such option: --rnak",
    "probe": "missing argument",
    "probe well --rank 0": "invalid value for '--rank': expected greater than or equal to 1",
    "probe well --budget 24": "expected a size such as 24GiB or 800MB, got 24",
    "probe well --budget 24gigs": "expected a size such as 24GiB",
    "--debug": "missing command",
}


@pytest.mark.parametrize("words", USAGE)
def test_a_usage_error_is_one_sentence_and_exit_code_2(probe, capsys, words):
    assert main(words.split()) == 2
    printed = capsys.readouterr().err.replace("Traceback", "").splitlines()[-1]
    assert printed.startswith("error: ")
    assert USAGE[words] in printed
    assert main(["--json", *words.split()]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "UsageError"
    assert USAGE[words] in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a POSIX signal")
def test_ctrl_c_ends_a_process_with_one_line_and_130(tmp_path):
    with probe_process(tmp_path, "wait") as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 130
    assert (out, err) == ("", "interrupted; the same command with --resume continues\n")


def starved():
    """llvmlite's error if the system's loader gets no memory for its library."""
    found = OSError("Could not find/load shared object file 'libllvmlite.so'")
    found.__context__ = OSError("libllvmlite.so: failed to map segment from shared object")
    return found


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "file"),
        starved(),
    ],
    ids=lambda error: str(error)[:20] or "MemoryError",
)
def test_a_lack_of_memory_is_one_sentence(error, capsys):
    assert report_failure(error, Terminal()) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: the system gave this process no more (")
    assert said.count("\n") == 1
    assert not re.search("plugin|install|find/load", said)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX pipe")
@pytest.mark.parametrize("words", [["much"], ["much", "--json"], ["--help"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(tmp_path, words):
    read, write = os.pipe()
    os.close(read)
    process = probe_process(tmp_path, *words, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (1, "")


# --- plugins -------------------------------------------------------------------------------------


def test_help_has_a_plugins_command_with_its_distribution(probe, capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"─ Rare ─.*\n│ probe +Do something\. \[fake-probe\]", shown)
    assert "[modulora-core]" not in shown


def test_a_command_whose_module_fails_says_whose_it_is(site, capsys):
    install_probe(site)
    (site.path / "fake_probe.py").write_text("import fake_missing_package")
    app.load_command.cache_clear()
    assert main(["probe", "well"]) == 2
    error = capsys.readouterr().err
    assert "command 'probe' of fake-probe 1.0 is broken: importing fake_probe:command" in error


def test_a_known_command_that_is_not_installed_names_its_distribution(monkeypatch, capsys):
    monkeypatch.setattr(registry, "requires", lambda _: ["modulora-absent>=0.1; extra == 'weigh'"])
    assert main(["weigh", "MODEL"]) == 2
    error = capsys.readouterr().err
    assert "no such command: 'weigh'; it is of modulora-absent, which isn't installed" in error
    assert "pip install -r plugins/requirements.txt" in error


@pytest.mark.parametrize("name", app.command_names())
def test_the_help_of_a_command_has_examples_that_parse(name, capsys):
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\\\n", " ").split())
    command = app.load_command(name)
    examples = re.findall(rf"^\s+(?:\S.* )?modulora {name}\b.*", command.help, flags=re.MULTILINE)
    assert examples, f"the docstring of {name} has no examples"
    for example in examples:
        assert " ".join(example.split()) in shown
        words = shlex.split(example, comments=True)
        command.make_context(name, words[words.index(name) + 1 :])  # raises a usage error
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        hidden = getattr(parameter, "hidden", False)  # the page of the command line has it
        assert all((name in shown) != hidden for name in names[:1] if name.startswith("--"))
    assert command.panels.keys() <= set(re.findall(r"─ (\w+) ─", shown))


def test_help_imports_nothing_heavy():
    code = """if True:
        import sys
        from modulora_core.cli import app, main
        names = app.command_names()
        codes = [main([*words, "--help"]) for words in ([], *([name] for name in names))]
        heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else max(codes))
    """
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage") == 1 + len(app.command_names())


def test_no_words_show_the_help_and_the_module_is_the_same_program():
    for word, expected in (("", "list-quantizers"), ("--version", modulora_core.__version__)):
        words = [sys.executable, "-m", "modulora_core.cli", *word.split()]
        result = subprocess.run(words, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0
        assert expected in result.stdout


def test_a_deleted_current_folder_is_refused(probe, capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["probe", "well"]) == 2
    assert "current folder: expected a folder, got a deleted one" in capsys.readouterr().err


def test_an_interrupted_command_knows_whether_it_left_work(tmp_path):
    (tmp_path / "adapter" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "packed.partial").mkdir()
    left = {name: app._left_work(tmp_path / name) for name in ("adapter", "packed", "new")}
    assert left == {"adapter": True, "packed": True, "new": False}


@pytest.mark.parametrize(
    "words",
    [
        "quantize MODEL OUT -q toy", "finetune MODEL OUT --data pydoc", "generate MODEL hello",
        "chat MODEL", "evaluate MODEL", "merge MODEL OUT", "info MODEL",
        "convert MODEL OUT --to modulora", "compare MODEL -q toy", "plan MODEL",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("offline_hub")
def test_each_command_of_a_model_takes_a_revision(words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for asked in (f"{words} --revision v7", words.replace("MODEL", "MODEL@v7")):
        code, found, _ = run(*asked.replace("MODEL", "org/tiny").split())
        assert code == 2
        assert "Hub at revision v7 didn't give it" in found["error"]["message"]
