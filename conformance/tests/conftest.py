"""Installs the zoo as a distribution, and runs pytest over it in this process."""

import importlib
import os
import sys
from pathlib import Path

import modulora_conformance
import pytest

# a plugin, a folder for others, and what runs a command
from modulora_core.tests.cli.conftest import run as run_command  # noqa: F401
from modulora_core.tests.conftest import site as empty_site  # noqa: F401
from modulora_core.tests.conftest import toy, toy_root  # noqa: F401

ZOO = Path(__file__).parent / "zoo"
SETTINGS = Path(modulora_conformance.__file__).parent / "pytest.ini"

sys.path.insert(0, str(ZOO))  # its modules are named in parameters


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The module modulora_zoo, installed with three entry points for the tests of a module."""
    site = tmp_path_factory.mktemp("site")
    info = site / "modulora_zoo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modulora-zoo\nVersion: 1.0\n")
    points = [f"{name} = {name}" for name in ("modulora_zoo", "zoo_heavy", "zoo_slow")]
    (info / "entry_points.txt").write_text("\n".join(["[modulora]", *points, ""]))
    paths = [str(ZOO), str(site)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*paths, *sys.path])
        given = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, *given]))
        importlib.invalidate_caches()
        yield importlib.import_module("modulora_zoo")


class Nested:
    """A nested run of pytest: its exit code, its outcomes by node, and the kit's runs by name."""

    def __init__(self, file, nodes, words, chosen):
        self.outcomes, self.runs, self.chosen = {}, {}, chosen
        ids = [f"{file}::{node}" for node in nodes]
        fixed = ["-q", "-p", "no:cacheprovider", "-c", str(SETTINGS), "--rootdir", str(ZOO)]
        fixed += ["--confcutdir", str(ZOO), "--tb=no", "--hypothesis-seed=20261125"]
        self.code = pytest.main([*ids, *fixed, *words], plugins=[self])

    def pytest_pycollect_makeitem(self, collector, name):
        """Leave out a check before pytest makes its items: the zoo has 14,000."""
        is_check = isinstance(collector, pytest.Class) and name.startswith("test_")
        return [] if is_check and not self.chosen(collector.name, name) else None

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            self.outcomes[report.nodeid.partition("::")[2]] = outcome

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        recorder = session.config.pluginmanager.get_plugin("modulora_conformance_recorder")
        self.runs = {run.quantizer: run for run in recorder.runs()}


@pytest.fixture(scope="module")
def nested(zoo):
    """``nested(*nodes, words=(), chosen=...)``: a run over classes or tests of
    ``zoo/check_zoo.py``. ``chosen`` says whether a class meets a check, both by name."""
    return lambda *nodes, words=(), chosen=lambda cls, check: True: Nested(
        ZOO / "check_zoo.py", nodes, words, chosen
    )
