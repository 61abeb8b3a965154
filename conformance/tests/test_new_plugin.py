"""``modulora new-plugin`` writes a package that installs, and passes its tests and the kit."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from modulora_conformance.commands.new_plugin import new_plugin

from modulora_core.cli import main
from modulora_core.errors import OptionError, OutputError
from modulora_core.tests.plugin_sites import site_of

NAME = "tried-rounding"
MODULE = "modulora_tried_rounding"

needs_pip = pytest.mark.skipif(
    find_spec("hatchling") is None or find_spec("pip") is None, reason="needs hatchling and pip"
)


def python(*words, folder, site=None):
    path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("new") / "plugin"
    new_plugin(NAME, out)
    return out


@pytest.fixture(scope="module")
def site(package, tmp_path_factory):
    """A folder for PYTHONPATH in which the package is installed as far as Python can tell."""
    return site_of(package, tmp_path_factory.mktemp("site"))


def test_the_report_lists_files_and_quotes_the_next_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", NAME, "mine", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    files = sorted(path for path in Path("mine").rglob("*") if path.is_file())
    there = sorted(path.relative_to("mine").as_posix() for path in files)
    assert printed == {"out": "mine", "quantizer": NAME, "files": there}
    assert main(["new-plugin", NAME, "my plugin"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "Next: pip install -e './my plugin[test]'",
        "then: pytest 'my plugin'",
        f"then: modulora conformance {NAME} --certified",
    ]


def test_the_files_fit_together(package):
    for path in package.rglob("*"):
        if path.is_file() and path.suffix != ".sh":
            text = path.read_text("utf-8").replace("${{", "")
            assert re.findall(r"\$\{|\$\$|\$[a-z]", text) == [], path.name
    project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == f"modulora-{NAME}"
    assert project["entry-points"]["modulora"] == {NAME: MODULE}
    workflow = yaml.safe_load((package / ".github/workflows/ci.yml").read_text("utf-8"))
    commands = str(workflow["jobs"]["test"]["steps"])
    assert "sh ci.sh" in commands
    assert "${{ matrix.python }}" in commands


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff isn't installed")
@pytest.mark.parametrize("name", ["x", "a-name-that-is-longer-than-most"])
def test_the_code_is_clean_for_short_and_long_names(name, tmp_path):
    new_plugin(name, tmp_path / "plugin")
    rules = ["--select", "E4,E7,E9,F,I,UP,B,N,RET,SIM,RUF", "--ignore", "N806,N803"]
    for words in (["check", "--isolated", *rules], ["format", "--isolated", "--diff"]):
        done = python("-m", "ruff", *words, ".", folder=tmp_path / "plugin")
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "Mine", "my_own", "my--own", "own-", "4bit", "../own", "äh"])
def test_a_malformed_name_is_refused(name, tmp_path):
    with pytest.raises(OptionError, match="expected a lower case letter first") as caught:
        new_plugin(name, tmp_path / "plugin")
    assert repr(name) in str(caught.value)
    assert not (tmp_path / "plugin").exists()


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        new_plugin(NAME, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_its_tests_and_the_kit_pass_and_git_ignores_the_large_reports(package, site, tmp_path):
    """If this fails: the output names the promise of the template that is broken.

    The checks of packing and tiles with 2 bits, and all promises. The tutorial's package, whose
    packing alone is another, has all checks with 3 bits.
    """
    words = (
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-k",
        f"test_{MODULE[9:]}.py or promise",
    )
    done = python(*words, folder=package, site=site)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "test_tiles_are_the_reference PASSED" in done.stdout
    promise = r"test_the_error_keeps_the_promise\[(bits=\d)\S* PASSED"
    assert set(re.findall(promise, done.stdout)) == {"bits=2", "bits=4", "bits=8"}
    words = ("-m", "modulora_core.cli", "conformance", NAME, "-o", "bits=2", "--level", "2")
    done = python(*words, "--report", str(tmp_path), folder=package, site=site)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / f"{NAME}.json").read_text("utf-8"))
    levels = {check["level"] for check in report["checks"] if check["outcome"] == "passed"}
    assert levels == {"L0", "L1", "L2"}
    ignored = (package / ".gitignore").read_text("utf-8").split()
    committed = {".svg", ".md"}
    for path in tmp_path.iterdir():
        assert (f"conformance/*{path.suffix}" in ignored) == (path.suffix not in committed)


def pip(command):
    """Work without a network."""
    return "-m", "pip", command, "-q", "--no-deps", "--no-build-isolation"


@needs_pip
@pytest.mark.slow
def test_pip_installs_it_and_it_is_listed(package, tmp_path):
    done = python(*pip("install"), "--target", str(tmp_path), str(package), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ("-m", "modulora_core.cli", "list-quantizers", "--json")
    listed = json.loads(python(*words, folder=package, site=tmp_path).stdout)["quantizers"]
    (row,) = [row for row in listed if row["name"] == NAME]
    found = (row["status"], row["distribution"], row["version"])
    assert found == ("ok", f"modulora-{NAME}", "0.1.0")
