"""Golden vectors: written once, they hold the bytes and their meaning."""

import json

import pytest
from modulora_conformance import golden
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PACKING, TILES = "test_packing_gives_the_golden_vectors", "test_tiles_give_the_golden_vectors"


@pytest.fixture
def written(zoo, tmp_path):
    """The file of the healthy one's golden vectors, and its metadata."""
    assert golden.main(["zoo-healthy", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        return path, file.metadata()


def outcomes(nested, path):
    words = ["--golden", str(path.parent), "--conformance-level", "1", "-k", "golden"]
    (run,) = nested("TestHealthy", words=words).runs.values()
    return {check.check: check for check in run.checks}


@pytest.mark.parametrize(
    ("name", "failed"),
    [(None, set()), ("tile", {TILES}), ("packed.codes", {PACKING, TILES})],
)
def test_a_change_of_one_value_fails(nested, written, name, failed):
    path, metadata = written
    tensors = load_file(path)
    if name is not None:
        tensors[name][3, 5] += 1
    save_file(tensors, path, metadata)
    found = outcomes(nested, path)
    assert found.keys() == {PACKING, TILES}
    assert {name for name, check in found.items() if check.outcome == "failed"} == failed


def test_another_format_is_one_failure_with_the_command_to_run(nested, written):
    path, metadata = written
    layout = json.loads(metadata["layout"]) | {"format": 3}
    save_file(load_file(path), path, {"layout": json.dumps(layout)})
    found = outcomes(nested, path)
    assert (found[PACKING].outcome, found[TILES].outcome) == ("failed", "skipped")
    command = "python -m modulora_conformance.golden zoo-healthy DIR"
    assert f"format 3 -> 1: write the golden vectors again: {command}" in found[PACKING].reason
    assert "has an old format: format 3 -> 1" in found[TILES].reason
