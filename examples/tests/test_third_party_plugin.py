"""Checks ``examples/third_party_plugin`` with the kit, as an outsider's CI."""

import json
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[1] / "third_party_plugin"


@pytest.fixture(scope="module")
def site(install):
    return install(PLUGIN)


@pytest.fixture
def conformance(site, run, tmp_path):
    def conform(*words):
        command = ["modulora_core.cli", "conformance", "half-quadratic", "--json"]
        done = run(tmp_path, site, *command, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout))

    return conform


@pytest.mark.slow
def test_it_passes_the_kit_and_leaves_a_report(conformance, tmp_path):
    result = conformance("-o", "bits=3", "--report", "report")
    assert result["distribution"] == "modulora-half-quadratic"
    assert result["failures"] == []
    assert result["levels"].keys() == {f"L{level}" for level in range(10)}
    assert (tmp_path / "report" / "half-quadratic.html").is_file()


@pytest.mark.slow
def test_it_keeps_the_promise_of_each_width(conformance):
    result = conformance("-k", "test_the_error_keeps_the_promise")
    assert len(result["configurations"]) >= 5
