"""A package of ``modulora new-plugin`` is whole: it is clean, installs, is found, passes its tests and the conformance kit."""

from __future__ import annotations

import json
import keyword
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import modulora_core
from modulora_core.cli import main
from modulora_core.cli.new_plugin import new_plugin
from modulora_core.errors import DuplicatePluginError, OptionError, OutputError
from modulora_core.tests.plugin_sites import site_of

NAME = "tried-rounding"
MODULE = "modulora_tried_rounding"

CORE = Path(modulora_core.__file__).parent
ROOT = CORE.parent

needs_kit = pytest.mark.skipif(
    find_spec("modulora_conformance") is None, reason="modulora-conformance isn't installed"
)


def python(*words: str, folder: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("new") / "plugin"
    new_plugin(NAME, out)
    return out


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which the package is installed as far as Python can tell."""
    return site_of(package, tmp_path_factory.mktemp("site"))


# --- what is written --------------------------------------------------------------------------------------


def test_the_report_names_the_files_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main(["new-plugin", NAME, str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    there = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert printed == {"out": str(out), "quantizer": NAME, "files": there}
    assert {
        f"src/{MODULE}/quantizer.py",
        "tests/test_tried_rounding_conformance.py",
        ".github/workflows/ci.yml",
    } <= set(there)


def test_the_next_three_commands_are_told_for_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", NAME, "my plugin"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "  pip install -e './my plugin[test]'",
        "  pytest 'my plugin'",
        f"  modulora conformance {NAME} --certified",
    ]


def test_nothing_of_the_templates_language_is_left(package: Path) -> None:
    """If this fails: a template names something that `PluginNames.substitutions` lacks, or `$$` where `$` was meant."""
    for path in package.rglob("*"):
        if path.is_file():
            text = path.read_text("utf-8").replace("${{", "")
            assert re.findall(r"\$\{|\$\$|\$[a-z]", text) == [], path.name


def test_the_project_file_has_the_entry_point_and_the_kit(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == f"modulora-{NAME}"
    assert project["entry-points"]["modulora"] == {NAME: MODULE}
    assert any(
        word.startswith("modulora-conformance") for word in project["optional-dependencies"]["test"]
    )


def test_the_workflow_certifies_and_keeps_the_report(package: Path) -> None:
    workflow = yaml.safe_load((package / ".github/workflows/ci.yml").read_text("utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == [
        "pip install -e '.[test]'",
        "pytest",
        f"modulora conformance {NAME} --certified --report report",
    ]
    assert steps[-1]["with"]["path"] == "report"
    assert steps[1]["with"]["python-version"] == "${{ matrix.python }}"


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff isn't installed")
@pytest.mark.parametrize("name", ["x", "a-name-that-is-longer-than-most"])
def test_the_code_is_clean_for_short_and_long_names(name: str, tmp_path: Path) -> None:
    new_plugin(name, tmp_path / "plugin")
    rules = ["--select", "E4,E7,E9,F,I,UP,B,N,RET,SIM,RUF", "--ignore", "N806,N803"]
    checked = python("-m", "ruff", "check", "--isolated", *rules, ".", folder=tmp_path / "plugin")
    assert checked.returncode == 0, checked.stdout
    formatted = python(
        "-m", "ruff", "format", "--isolated", "--diff", ".", folder=tmp_path / "plugin"
    )
    assert formatted.returncode == 0, formatted.stdout


@pytest.mark.parametrize(
    "name", ["none", "class", "quantizer", "tensor", "options", *keyword.kwlist[3:6]]
)
def test_names_that_mean_something_in_python_give_code_that_compiles(
    name: str, tmp_path: Path
) -> None:
    new_plugin(name.lower(), tmp_path / "plugin")
    for path in (tmp_path / "plugin").rglob("*.py"):
        compile(path.read_text("utf-8"), path.name, "exec")


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "Mine", "my_own", "my--own", "-own", "own-", "4bit", "my own", "../own", "äh"]
)
def test_a_malformed_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected a lower case letter first") as caught:
        new_plugin(name, tmp_path / "plugin")
    assert repr(name) in str(caught.value)
    assert not (tmp_path / "plugin").exists()


def test_the_name_of_an_installed_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DuplicatePluginError, match="modulora_core has; choose another"):
        new_plugin("core", tmp_path / "plugin")


def test_the_name_of_an_installed_quantizer_is_refused(site: Path, tmp_path: Path) -> None:
    done = python(
        "-m", "modulora_core.cli", "new-plugin", NAME, "plugin", folder=tmp_path, site=site
    )
    assert done.returncode == DuplicatePluginError.exit_code
    assert f"one that modulora-{NAME} 0.1.0 has" in done.stderr


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        new_plugin(NAME, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --- what it does -----------------------------------------------------------------------------------------


def test_the_quantizer_is_listed(package: Path, site: Path, tmp_path: Path) -> None:
    done = python(
        "-m", "modulora_core.cli", "list-quantizers", "--json", folder=tmp_path, site=site
    )
    (row,) = [row for row in json.loads(done.stdout)["quantizers"] if row["name"] == NAME]
    assert (row["status"], row["distribution"], row["version"]) == (
        "ok",
        f"modulora-{NAME}",
        "0.1.0",
    )


def test_its_own_tests_pass(package: Path, site: Path) -> None:
    facts = package / "tests" / "test_tried_rounding.py"
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(facts), folder=package, site=site
    )
    assert done.returncode == 0, done.stdout


@needs_kit
@pytest.mark.slow
def test_it_is_certified_as_it_stands(package: Path, site: Path, tmp_path: Path) -> None:
    """If this fails: the output says which promise of the template isn't kept."""
    words = ("-m", "modulora_conformance", NAME, "--certified", "--report", str(tmp_path))
    done = python(*words, folder=tmp_path, site=site)
    assert done.returncode == 0, done.stdout[-4000:]
    assert json.loads((tmp_path / f"{NAME}.json").read_text("utf-8"))["certified"] is True


@needs_kit
def test_its_conformance_class_passes_with_every_promise(package: Path, site: Path) -> None:
    tests = package / "tests" / "test_tried_rounding_conformance.py"
    words = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--conformance-level", "0", str(tests))
    done = python(*words, folder=package, site=site)
    assert done.returncode == 0, done.stdout[-4000:]
    assert set(re.findall(r"\[(bits=\d)\] PASSED", done.stdout)) == {"bits=2", "bits=4", "bits=8"}


needs_pip = pytest.mark.skipif(
    find_spec("hatchling") is None or find_spec("pip") is None, reason="needs hatchling and pip"
)


def pip(command: str) -> tuple[str, ...]:
    """Without a network: what would be built or needed is here."""
    return "-m", "pip", command, "-q", "--no-deps", "--no-build-isolation"


@needs_pip
def test_pip_installs_it(package: Path, tmp_path: Path) -> None:
    done = python(*pip("install"), "--target", str(tmp_path), str(package), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = python("-m", "modulora_core.cli", "list-quantizers", folder=package, site=tmp_path)
    assert NAME in listed.stdout


@needs_pip
@pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="the project's source tree isn't here"
)
def test_the_wheel_of_the_core_has_every_template(tmp_path: Path) -> None:
    done = python(*pip("wheel"), "-w", str(tmp_path), str(ROOT), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    templates = CORE / "cli" / "templates"
    there = {path.relative_to(ROOT).as_posix() for path in templates.rglob("*") if path.is_file()}
    assert there <= set(zipfile.ZipFile(wheel).namelist())
    assert len(there) == len(new_plugin(NAME, tmp_path / "plugin").files)
