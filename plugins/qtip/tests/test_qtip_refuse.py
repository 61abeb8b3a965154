"""Damaged packed folders and impossible requests end in one sentence and exit code 2."""

import json
import shutil

import pytest
import torch
from modulora_qtip.reference import Options
from safetensors.torch import load_file, save_file

from modulora_core import load_model
from modulora_core.cli import main
from modulora_core.errors import CheckpointError
from modulora_core.registry import Choice

LAYER = "model.layers.1.mlp.up_proj.weight"


def quantize_words(dense, out, *options):
    words = ["quantize", str(dense), str(out), "-q", "qtip", *options]
    return [*words, "--calibration", f"{dense}/text.txt", "--samples", "2", "--seq-len", "32"]


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "m"
    quick = ["-o", "states=10", "-o", "sweeps=0", "--exclude", "*self_attn*"]
    assert main(quantize_words(dense, folder, *quick)) == 0
    return folder


def changed(packed, folder, change):
    shutil.copytree(packed, folder)
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "value"), [("suh", torch.nan), ("svh", torch.inf), ("scale", -torch.inf)]
)
def test_scales_must_be_finite(part, value, packed, tmp_path, refused):
    def spoil(tensors):
        tensors[f"{LAYER}.{part}"][-1] = value

    folder, out = changed(packed, tmp_path / "m", spoil), tmp_path / "out"
    (folder / "SHA256SUMS").unlink()  # the values are checked too
    message = rf"{LAYER}\.{part}: expected finite values, got NaN or Inf"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, device="cpu")
    for words in (["generate", folder, "a line"], ["merge", folder, out]):
        assert f"{LAYER}.{part}: expected finite values" in refused(words)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, device="cpu", mapped=True)(torch.tensor([[1, 2, 3]]))
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 9, "bits: expected 1 to 8 in steps of a half, got 9"),
        ("states", 17, "states: expected 2 to 16, got 17"),
        ("code", ["mcg", "mul1"], "expected values of bits, states, code, hadamard"),
        ("hadamard", "64", "hadamard: expected one of full, 128"),
    ],
)
def test_metadata_that_no_walk_has_is_refused(key, value, message, packed, tmp_path, refused):
    folder = changed(packed, tmp_path / "m", lambda _: None)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    records = list(_records(config))
    assert records
    for record in records:
        record[key] = value
    file.write_text(json.dumps(config))
    for words in (["info", folder], ["generate", folder, "a line"]):
        assert message in refused(words)


def _records(found):
    """The metadata of packed weights in a config."""
    if isinstance(found, dict) and {"bits", "states", "code", "hadamard"} <= found.keys():
        yield found
    elif isinstance(found, dict | list):
        for part in found.values() if isinstance(found, dict) else found:
            yield from _records(part)


@pytest.mark.parametrize(("bits", "states"), [("2.5", 12), ("6.5", 13), ("7", 13), ("8", 14)])
def test_many_bits_have_a_larger_state_on_the_command_line_too(bits, states):
    for options in (Choice.parse(f"qtip:bits={bits}").create().options, Options(bits=float(bits))):
        assert (options.bits, options.states) == (float(bits), states)
