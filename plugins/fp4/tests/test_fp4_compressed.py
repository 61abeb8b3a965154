"""NVFP4 and MXFP4 folders of compressed-tensors are read to the last bit, and written."""

import json
import shutil

import pytest
import torch
from modulora_convert.convert import convert
from safetensors.torch import load_file, save_file

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import create
from modulora_core.spec import PackedWeight
from modulora_core.tests.compressed_folders import load_dequantized, save_compressed
from modulora_core.tests.fuzzing import refused_or_runs
from modulora_core.tests.other_tools import _SIZES, assert_used, logits
from modulora_core.tests.tiny_models import save_tiny_model

pytest.importorskip("compressed_tensors")
# transformers says which of two configs it takes
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
         "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}  # fmt: skip
MODELOPT = {"quant_algo": "NVFP4", "group_size": 16}
DOWN = "model.layers.0.mlp.down_proj"
NAMES = {"codes": "packed", "scales": "scale", "global_scale": "global_scale"}

formats = pytest.mark.parametrize(
    ("name", "weights"), [("nvfp4-pack-quantized", NVFP4), ("mxfp4-pack-quantized", MXFP4)]
)


@formats
def test_weights_are_those_of_transformers_and_come_back(name, weights, tmp_path):
    folder = tmp_path / "theirs"
    save_compressed(folder, name, torch.bfloat16, **weights)
    checkpoint, theirs = open_packed(folder), load_dequantized(folder)
    for parameter in checkpoint.record.weights:
        (packed,) = checkpoint.packed(parameter)
        quantizer = checkpoint.quantizer(checkpoint.parameters[parameter])
        ours = quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.bfloat16)
        assert torch.equal(ours, theirs.get_parameter(parameter).to(torch.bfloat16)), parameter
    assert len(checkpoint.record.weights) == 14
    if name.startswith("mx"):  # NVFP4 is rounded to bf16 there
        expected = logits(theirs)
        limit = 1e-5 * float(expected.abs().max())
        found = logits(load_model(checkpoint, dtype="float32"))
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    convert(str(folder), tmp_path / "ours", "modulora")
    convert(str(tmp_path / "ours"), tmp_path / "back", name)
    before, after = (
        load_file(tmp_path / which / "model.safetensors") for which in ("theirs", "back")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].float(), after[n].float()) for n in before)


def to_modelopt(folder):
    """Rename the tensors of an NVFP4 folder, and store the reciprocal of each global scale."""
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            stored |= {f"{module}.weight": tensor, f"{module}.input_scale": torch.tensor(0.5)}
        elif part == "weight_global_scale":
            stored[f"{module}.weight_scale_2"] = 1 / tensor[0]
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", **MODELOPT}
    (folder / "config.json").write_text(json.dumps(config))


def test_experts_that_are_layers_in_the_files_become_stacks(tmp_path):
    """Gate and up keep a global scale each."""
    folder, experts = tmp_path / "moe", "model.layers.0.mlp.experts"
    save_compressed(folder, "nvfp4-pack-quantized", architecture="qwen3_moe", **NVFP4)
    stored = load_file(folder / "model.safetensors")
    stored[f"{experts}.1.up_proj.weight_global_scale"] *= 2
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    to_modelopt(folder)
    stored = {name: t.view(torch.uint8) if t.itemsize == 1 else t for name, t in stored.items()}
    fp4 = create("fp4", {"type": "nvfp4"})
    dense = assert_used(folder, tmp_path)
    for index, stack in enumerate(dense.get_parameter(f"{experts}.gate_up_proj")):
        for which, rows in {"gate": stack[:64], "up": stack[64:]}.items():
            layer = f"{experts}.{index}.{which}_proj.weight"
            parts = {ours: stored[f"{layer}_{theirs}"] for ours, theirs in NAMES.items()}
            packed = PackedWeight("fp4", fp4.format, (64, 64), parts, {"type": "nvfp4"})
            W = fp4.dequantize_tile(packed, (0, 64), torch.float32)
            torch.testing.assert_close(rows, W, rtol=1e-6, atol=0)


def test_conv1d_which_transformers_would_fill_with_noise_is_refused(tmp_path):
    save_tiny_model("gpt2", tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "fp4", {"type": "mxfp4"})
    with pytest.raises(ModelError, match=r"c_attn\.weight: a Conv1D layer, which the format mxfp4"):
        convert(str(tmp_path / "packed"), tmp_path / "theirs", "mxfp4-pack-quantized")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@formats
def test_a_model_of_ours_is_read_by_transformers(name, weights, dtype, tmp_path):
    """Whatever the dtype of the model was, such as float32 of a GGUF file."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    del weights
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**_SIZES["llama"]))
    dense.to(dtype).save_pretrained(tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "fp4", {"type": name.partition("-")[0]})
    convert(str(tmp_path / "packed"), tmp_path / "theirs", name)
    expected = logits(load_model(tmp_path / "packed", dtype="float32"))
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]
    assert config["dtype"] == "bfloat16"
    for model in (  # weights are rounded to bf16 in both
        load_dequantized(tmp_path / "theirs"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"),
    ):
        limit = 0.03 * float(expected.abs().max())
        torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("own_file", [False, True], ids=["config.json", "hf_quant_config.json"])
def test_a_folder_of_modelopt_holds_the_same_model(own_file, tmp_path):
    save_compressed(tmp_path / "theirs", "nvfp4-pack-quantized", torch.bfloat16, **NVFP4)
    expected = logits(load_model(tmp_path / "theirs", dtype="float32"))
    folder = tmp_path / "modelopt"
    shutil.copytree(tmp_path / "theirs", folder)
    to_modelopt(folder)
    config = json.loads((folder / "config.json").read_text())
    facts = {**MODELOPT}
    if own_file:
        del config["quantization_config"]
        described = {"producer": {"name": "modelopt"}, "quantization": facts}
        (folder / "hf_quant_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps(config))
    found = logits(load_model(folder, dtype="float32"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    facts["quant_algo"] = "FP8"
    config["quantization_config"] = {"quant_method": "modelopt", **facts}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected quant_algo NVFP4, got 'FP8'"):
        open_packed(folder)


def test_damaged_folders_are_refused(tmp_path):
    save_compressed(tmp_path, "nvfp4-pack-quantized", torch.bfloat16, **NVFP4)
    whole = {n: t.clone() for n, t in load_file(tmp_path / "model.safetensors").items()}
    packed, scale, g = (f"{DOWN}.weight_{part}" for part in ("packed", "scale", "global_scale"))
    nan = torch.full(whole[scale].shape, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    cases = {
        rf"{packed}: expected uint8 \[out, in / 2\], got uint8": {packed: whole[packed].flatten()},
        rf"{scale}: expected float8_e4m3fn \[64, 8\] by": {scale: whole[scale][:, 1:]},
        rf"{g}: expected float32 \[1\] by": {g: whole[g].double()},
        f"{scale}: expected nvfp4 scales, got the byte 127": {scale: nan},
        f"{g}: expected a positive number, got 0": {g: 0 * whole[g]},
        f"{g}: expected finite values": {g: whole[g] * torch.nan},
    }
    for told, changed in cases.items():
        stored = {n: t.contiguous() for n, t in (whole | changed).items()}
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=told):
            load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for told, changed in {
        "expected dense weights, got 'sparse-24'": {"sparsity_config": {"format": "sparse-24"}},
        "quantized with compressed-tensors, which no installed": {"format": "float-quantized"},
    }.items():
        quantization = {**config["quantization_config"], **changed}
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
        with pytest.raises(ModelError, match=told):
            open_packed(tmp_path)


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(tmp_path):
    save_compressed(tmp_path, "nvfp4-pack-quantized", torch.bfloat16, **NVFP4)
    refused_or_runs(tmp_path)
