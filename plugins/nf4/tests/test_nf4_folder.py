"""bitsandbytes' 4-bit folders, as transformers saves them, are read to the last bit."""

import json

import pytest
import torch
from modulora_nf4.quantizer import NF4
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

DOWN = "model.layers.0.mlp.down_proj.weight"


def save(folder, architecture="llama", dtype=torch.float32, **options):
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options}
    save_quantized(folder, BitsAndBytesConfig(**kind), architecture, dtype)


def tensors(folder):
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


def change(folder, **changed):
    save_file(tensors(folder) | changed, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("architecture", "dtype", "options"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.float16, {"bnb_4bit_quant_storage": torch.bfloat16}),
        ("llama", torch.bfloat16, {"bnb_4bit_use_double_quant": True}),
        (
            "llama",
            torch.float32,
            {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.float32},
        ),
        ("gpt2", torch.float32, {"bnb_4bit_use_double_quant": True}),
    ],
    ids=str,
)
def test_tiles_and_logits_are_those_of_bitsandbytes(architecture, dtype, options, tmp_path):
    save(tmp_path, architecture, dtype, **options)
    theirs = load_with_transformers(tmp_path)
    checkpoint = open_packed(tmp_path)
    for name, site in checkpoint.record.items():
        (packed,) = checkpoint.packed(name)
        weight = theirs.get_parameter(name)
        assert weight.quant_state.dtype == dtype
        expected = functional.dequantize_4bit(weight.data, weight.quant_state)
        ours = NF4().dequantize_tile(packed, (0, packed.shape[0]), dtype)
        assert torch.equal(ours, expected), name
        assert site.layout.metadata["double_quant"] == ("bnb_4bit_use_double_quant" in options)
    assert len(checkpoint.record.weights) == (14 if architecture == "llama" else 4)
    if dtype == torch.float32:  # bitsandbytes rounds weights to the dtype that they had
        ours = logits(load_model(tmp_path, dtype="float32", device="cpu"))
        torch.testing.assert_close(ours, logits(theirs), rtol=1e-4, atol=1e-4)


def test_layers_left_dense_stay_dense_and_other_block_sizes_are_read(tmp_path):
    save(tmp_path, llm_int8_skip_modules=["lm_head", "q_proj"])
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(W, blocksize=128, quant_type="nf4")
    parts = {f"{DOWN}.{name}": part for name, part in state.as_dict(packed=True).items()}
    change(tmp_path, **{DOWN: codes, **parts})
    checkpoint = open_packed(tmp_path)
    assert len(checkpoint.record.weights) == 12
    (packed,) = checkpoint.packed(DOWN)
    ours = NF4().dequantize_tile(packed, (0, 64), torch.float32)
    assert torch.equal(ours, functional.dequantize_4bit(codes, state))


def test_it_trains_as_its_copy_in_our_format(tmp_path):
    save(tmp_path / "bitsandbytes", dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
    assert_trains_as_converted(tmp_path / "bitsandbytes", tmp_path)


def test_fp4_is_refused_by_name(tmp_path):
    save(tmp_path, bnb_4bit_quant_type="fp4")
    told = r'quantized as fp4; only nf4 .*bnb_4bit_quant_type="nf4"'
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"fp4"', '"nf4"'))
    with pytest.raises(ModelError, match=rf"proj\.weight: {told}"):
        open_packed(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").unlink()  # known before the weights are there
    with pytest.raises(ModelError, match=f"config: {told}"):
        open_packed(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    save(tmp_path, bnb_4bit_use_double_quant=True)
    whole, state = tensors(tmp_path), f"{DOWN}.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(whole[state].tolist()))

    def described(**changed):
        return torch.tensor(list(json.dumps(facts | changed).encode()), dtype=torch.uint8)

    opening = {
        f"{DOWN}: expected 4096 bytes by its quant_state, got 4064": {DOWN: whole[DOWN][32:]},
        rf"{DOWN}.absmax: expected uint8 \[128\]": {f"{DOWN}.absmax": whole[f"{DOWN}.absmax"][1:]},
        f"{state}: nested_blocksize: .* got 128": {state: described(nested_blocksize=128)},
        f"{state}: shape": {state: described(shape=[64])},
        f"{state}: .*JSON": {state: torch.zeros(3, dtype=torch.uint8)},
        f"{state}: blocksize: .* got 48": {state: described(blocksize=48)},
    }
    for match, changed in opening.items():
        change(tmp_path, **(whole | changed))
        with pytest.raises(CheckpointError, match=match):
            open_packed(tmp_path)
    loading = {
        f"{DOWN}.quant_map: expected the 16 values": "quant_map",
        f"{DOWN}.nested_quant_map: expected the 256 values": "nested_quant_map",
    }
    for match, part in loading.items():
        change(tmp_path, **(whole | {f"{DOWN}.{part}": whole[f"{DOWN}.{part}"] * 0.5}))
        with pytest.raises(CheckpointError, match=match):
            load_model(tmp_path)
    nan = whole[f"{DOWN}.nested_absmax"] * float("nan")
    change(tmp_path, **(whole | {f"{DOWN}.nested_absmax": nan}))
    with pytest.raises(CheckpointError, match="nested_absmax: expected finite values"):
        load_model(tmp_path)


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(tmp_path):
    save(tmp_path, bnb_4bit_use_double_quant=True)
    refused_or_runs(tmp_path)
