"""``modulora conformance``: its report, and refusals before the first check."""

import json
import os
import subprocess
import sys

import pytest

from modulora_core.cli import main
from modulora_core.spec import Promise
from modulora_core.tests.conftest import TOY_FORMAT, TOY_INIT, TOY_QUANTIZER, install_package


@pytest.mark.slow
def test_a_run_prints_the_result_alone_and_leaves_the_reports(tmp_path):
    site, reports = tmp_path / "site", tmp_path / "reports"
    hook = "import torch\n" + TOY_INIT  # level 0 refuses a hook that imports torch
    files = {"__init__.py": hook, "quantizer.py": TOY_QUANTIZER, "crude.py": TOY_FORMAT}
    install_package(site, "modulora-toy", "toy", "modulora_toy", files)
    words = ("conformance", "toy", "--level=0", "-o", "levels=7", "--seed=5", f"--report={reports}")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-m", "modulora_core.cli", *words, "--json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300,
    )  # fmt: skip
    found = json.loads(ran.stdout)
    assert found.keys() >= {"suite", "protocol", "certified"}
    assert (found["quantizer"], found["seed"]) == ("toy", "5")
    assert found["configurations"] == ["levels=7"]
    assert found["speed"]["levels=7"]["timings"]
    assert found["levels"].keys() == {"L0"}
    assert found["levels"]["L0"]["passed"] > 5
    assert "torch" in str(found["failures"])
    assert ran.returncode == 1
    first, *_ = ran.stderr.partition("= conformance of toy =")[2].splitlines()[1:]
    assert first.startswith("Not certified: ")
    assert ran.stderr.count("FAILED L0 test_metadata_is_known_without_torch") == 1
    assert "Traceback" not in ran.stderr
    names = {path.name for path in reports.iterdir()}
    assert names == {f"toy.{suffix}" for suffix in ("json", "html", "svg", "md", "xml")}


WRONG = {
    "tyo": "did you mean 'toy'",
    "toy -o levels": "expected key=value",
    "toy -o level=3": "levels",
    "toy -o levels=1000": "levels",
    "toy --level 10": "--level",
    "toy --level 3 --certified": "--certified: expected every check, got --level 3 too",
    "toy -x -k pack --certified": "--certified: expected every check, got -k and -x too",
    "toy --quick --certified": "--certified: expected every check, got --quick too",
    "toy --tb all": "--tb",
    "toy -k nothere": "-k 'nothere': expected a part of a check's name",
    "": "NAME: expected a quantizer of `modulora list-quantizers`",
    "toy --golden missing": "--golden",
    "toy --report {file}": "--report",
    "toy --report {file}/new": "--report",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_refused_before_any_check(toy, capfd, tmp_path, words):
    (tmp_path / "file").touch()
    code = main(["conformance", *words.format(file=tmp_path / "file").split(), "--json"])
    printed = capfd.readouterr()
    assert code == 2
    assert WRONG[words] in json.loads(printed.out)["error"]["message"]
    assert "passed" not in printed.err


BROKEN = {
    "__init__.py": ("raise KeyError('mine')", "__init__.py, line 2"),
    "quantizer.py": ("from torch import nothing", "quantizer.py, line 2"),
}


@pytest.mark.parametrize("file", BROKEN)
def test_the_author_reads_which_line_is_broken(tmp_path, file):
    files = {"__init__.py": TOY_INIT, "quantizer.py": TOY_QUANTIZER, "crude.py": TOY_FORMAT}
    line, where = BROKEN[file]
    files[file] = f"\n{line}\n"
    install_package(tmp_path, "modulora-toy", "toy", "modulora_toy", files)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-m", "modulora_core.cli", "conformance", "toy"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 2
    assert f"{where}); mend it, and run again" in ran.stderr
    assert "report it to its authors" not in ran.stderr


def test_checks_and_promises_are_printed_without_a_run(toy, capsys):
    assert main(["conformance", "--list", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert len(checks) > 80
    assert [
        c["check"] for c in checks if not c["fault"].endswith(".") or "If this" in c["fault"]
    ] == []
    assert main(["conformance", "toy", "-o", "levels=7", "--measure"]) == 0
    pasted = eval(f"dict({capsys.readouterr().out})", {"Promise": Promise})
    (promise,) = pasted["promises"]
    assert promise.options == {"levels": 7}
    assert pasted["packing_memory"] > 0
    assert main(["conformance", "toy", "-o", "levels=7", "--measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["promises"]
    assert [Promise(**each) for each in found] == [promise]
