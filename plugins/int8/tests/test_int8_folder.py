"""bitsandbytes' 8-bit folders, as transformers saves them, are read to the last bit."""

import pytest
import torch
from modulora_int8.quantizer import INT8
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.tests.fuzzing import refused_or_runs
from modulora_core.tests.other_tools import (
    assert_trains_as_converted,
    load_with_transformers,
    logits,
    save_quantized,
)

functional = pytest.importorskip("bitsandbytes.functional")

DOWN = "model.layers.0.mlp.down_proj"


def save(folder, architecture="llama", **options):
    quantization = BitsAndBytesConfig(load_in_8bit=True, **options)
    save_quantized(folder, quantization, architecture)


def change(folder, **changed):
    whole = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(whole | changed, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tiles_are_those_of_bitsandbytes_and_logits_those_of_the_rounded_model(
    architecture, tmp_path
):
    skipped = ["lm_head", "q_proj"]
    save(tmp_path, architecture, llm_int8_skip_modules=skipped, llm_int8_threshold=3.0)
    theirs = load_with_transformers(tmp_path)
    ours, checkpoint = load_model(tmp_path, dtype="float32"), open_packed(tmp_path)
    dense = load_with_transformers(tmp_path / "dense")
    for name, site in checkpoint.record.items():
        (packed,) = checkpoint.packed(name)
        weight = theirs.get_parameter(name)
        expected = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        tile = INT8().dequantize_tile(packed, (0, packed.shape[0]), torch.float32)
        assert torch.equal(tile, expected), name
        dense.get_parameter(name).data = tile.T if site.kind == "conv1d" else tile
    assert len(checkpoint.record.weights) == (12 if architecture == "llama" else 4)
    torch.testing.assert_close(logits(ours), logits(dense), rtol=1e-4, atol=1e-4)
    # bitsandbytes also rounds activations
    error = (logits(ours) - logits(theirs)).norm() / logits(theirs).norm()
    assert error < 0.05


def test_it_trains_as_its_copy_in_our_format(tmp_path):
    save(tmp_path / "bitsandbytes")
    assert_trains_as_converted(tmp_path / "bitsandbytes", tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    save(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    weight, scales = whole[f"{DOWN}.weight"].clone(), whole[f"{DOWN}.SCB"].clone()
    change(tmp_path, **{f"{DOWN}.SCB": scales[1:]})
    with pytest.raises(CheckpointError, match=rf"{DOWN}.SCB: expected float32 \[64\]"):
        open_packed(tmp_path)
    change(tmp_path, **{f"{DOWN}.SCB": scales, f"{DOWN}.weight": weight.float()})
    with pytest.raises(CheckpointError, match=rf"{DOWN}.weight: expected int8 \[out, in\]"):
        open_packed(tmp_path)
    older = torch.tensor(2, dtype=torch.uint8)
    change(tmp_path, **{f"{DOWN}.weight": weight, f"{DOWN}.weight_format": older})
    with pytest.raises(ModelError, match="weight_format: expected 0, codes in rows, got 2"):
        open_packed(tmp_path)
    change(tmp_path, **{f"{DOWN}.weight_format": older * 0, f"{DOWN}.SCB": scales / 0})
    with pytest.raises(CheckpointError, match=f"{DOWN}.SCB: expected finite values"):
        load_model(tmp_path)


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(tmp_path):
    save(tmp_path)
    refused_or_runs(tmp_path)
