"""A folder that another tool quantized loads as the model that it holds."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modulora_core.checkpoints.opening import is_packed, open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.inference.opened import open_to_run
from modulora_core.layers import QuantLinear
from modulora_core.models import open_dense
from modulora_core.tests.crude_folders import edit_config, save_crude

pytestmark = pytest.mark.usefixtures("toy")

IDS = torch.arange(3, 27).view(2, 12)
UP = "model.layers.0.mlp.up_proj"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_loads_as(folder, dense):
    model = load_model(folder, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize(
    ("config_file", "files", "told"),
    [
        ("config.json", 3, r"crude \(config\.json"),
        ("crude.json", 1, r"crude \(crude\.json"),
        (None, 1, r"crude_3 \(config\.json"),
    ],
)
def test_a_foreign_folder_is_packed_wherever_its_config_is(config_file, files, told, tmp_path):
    dense = save_crude(tmp_path / "m", files=files, config_file=config_file)
    model = assert_loads_as(tmp_path / "m", dense)
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert packed == [name for name, _ in dense.named_modules() if name.endswith("proj")]
    assert is_packed(tmp_path / "m")
    opened = open_to_run(str(tmp_path / "m"), dtype="float32", device="cpu").load()
    assert torch.equal(logits(opened), logits(model))
    merge(str(tmp_path / "m"), tmp_path / "out", dtype="float32")
    merged = open_to_run(str(tmp_path / "out"), dtype="float32", device="cpu").load().state_dict()
    assert all(torch.equal(merged[name], value) for name, value in dense.state_dict().items())
    rewrite = rf"already quantized with {told}\).*modulora convert .*/m OUT --to modulora"
    with pytest.raises(ModelError, match=rewrite):
        open_dense(str(tmp_path / "m"))


def test_a_conv1d_is_read_as_out_by_in(tmp_path):
    assert_loads_as(tmp_path, save_crude(tmp_path, "gpt2", chosen=lambda name: ".c_" in name))
    assert {site.kind for _, site in open_packed(tmp_path).record.items()} == {"conv1d"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head_is_packed_and_untied(tied, tmp_path):
    dense = save_crude(tmp_path, chosen=lambda name: name.endswith("proj") or name == "lm_head")
    edit_config(tmp_path, tie_word_embeddings=tied)
    assert isinstance(assert_loads_as(tmp_path, dense).lm_head, QuantLinear)
    assert "output head" not in open_packed(tmp_path).record.kept


def test_a_bias_without_a_place_must_be_zero(tmp_path):
    save_crude(tmp_path / "zero", **{f"{UP}.bias": torch.zeros(48)})
    assert len(open_packed(tmp_path / "zero").record.weights) == 14
    save_crude(tmp_path / "ones", **{f"{UP}.bias": torch.ones(48)})
    with pytest.raises(ModelError, match=f"{UP}.bias: the files have a bias that isn't zero"):
        open_packed(tmp_path / "ones")


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_norm.weight", "layers.0.mlp.up_proj.perm"])
def test_a_tensor_that_nobody_reads_is_refused(name, tmp_path):
    save_crude(tmp_path, **{f"model.{name}": torch.ones(8)})
    with pytest.raises(CheckpointError, match=rf"{name}: expected a tensor that LlamaFor.* reads"):
        open_packed(tmp_path)


def change_tensors(folder, change):
    stored = load_file(folder / "model.safetensors")
    changed = [change(name, tensor) for name, tensor in stored.items()]
    tensors = {name: t.clone() for one in changed for name, t in one.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


PARTS = {
    "qkv_proj": {"q_proj": 32, "k_proj": 16, "v_proj": 16},
    "gate_up_proj": {"gate_proj": 48, "up_proj": 48},
}


def in_parts(name, tensor):
    """A tensor of a layer as its parts have it: their rows are its last dimension."""
    module, _, word = name.rpartition(".")
    parent, _, layer = module.rpartition(".")
    rows = PARTS.get(layer)
    if rows is None:
        return {name: tensor}
    pieces = tensor.split(list(rows.values()), dim=-1)
    return {f"{parent}.{part}.{word}": t for part, t in zip(rows, pieces, strict=True)}


def test_a_layer_may_be_stored_in_parts(tmp_path):
    dense = save_crude(tmp_path, "phi3")
    change_tensors(tmp_path, in_parts)
    assert_loads_as(tmp_path, dense)
    assert any("qkv_proj" in name for name in open_packed(tmp_path).record.weights)
    bias = {"model.layers.1.self_attn.k_proj.bias": torch.ones(16)}
    change_tensors(tmp_path, lambda name, tensor: {name: tensor, **bias})
    with pytest.raises(ModelError, match=r"k_proj\.bias: the model has one bias for .*qkv_proj"):
        open_packed(tmp_path)


def test_the_padding_of_a_layer_is_cut_off(tmp_path):
    dense = save_crude(
        tmp_path, "llama-biased", chosen=lambda name: name.endswith(("proj", "lm_head"))
    )

    def pad(name, tensor):
        more = [5 * (size % 32 != 0 or size > 90) for size in tensor.shape]
        if not name.endswith(("turned", "factor", "proj.bias")):
            return {name: tensor}
        sizes = [size + extra for size, extra in zip(tensor.shape, more, strict=True)]
        padded = torch.ones(sizes, dtype=tensor.dtype)
        padded[tuple(slice(size) for size in tensor.shape)] = tensor
        return {name: padded}

    change_tensors(tmp_path, pad)
    with pytest.raises(CheckpointError, match=r"expected .* by the config, got"):
        open_packed(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "crude", "levels": 127, "padded": 1})
    assert_loads_as(tmp_path, dense)


EXTRA = {
    "model.layers.0.mlp.x_proj.turned": torch.ones(4, 4).char(),
    "model.layers.0.mlp.x_proj.factor": torch.ones(4),
}


@pytest.mark.parametrize(
    ("saved", "changes", "error", "message"),
    [
        (EXTRA, {}, ModelError, r"0\.mlp\.x_proj is quantized there.*LlamaFor.* has no such layer"),
        ({f"{UP}.weight": torch.ones(2)}, {}, CheckpointError, "the files have it, and .*turned"),
        ({"chosen": lambda _: False}, {}, CheckpointError, "no tensor of its files is"),
        (
            {"architecture": "qwen3_moe", "chosen": lambda name: ".experts.0" in name}, {},
            ModelError, r"0\.gate_proj is quantized as a layer of its own; in .*gate_up_proj",
        ),
        (
            {}, {"quantization_config": {"quant_method": "exotic"}}, ModelError,
            r"quantized with exotic, which no .* \(formats: .*crude.* give the original model",
        ),
        (
            {}, {"quantization_config": {"quant_method": "mxfp8"}}, ModelError,
            r"with mxfp8, which no .* or dequantize it with .*=FineGrainedFP8Config\(dequantize",
        ),
        (
            {}, {"quantization_config": {"quant_method": "crude", "levels": 200}}, ModelError,
            "levels 200: not implemented",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_is_refused(saved, changes, error, message, tmp_path):
    save_crude(tmp_path, **saved)
    edit_config(tmp_path, **changes)
    with pytest.raises(error, match=message):
        open_packed(tmp_path)


def test_a_config_file_must_be_json_of_the_formats_method(tmp_path):
    save_crude(tmp_path, config_file="crude.json")
    (tmp_path / "crude.json").write_text('{"quant_method": "other"}')
    assert not is_packed(tmp_path)
    (tmp_path / "crude.json").write_text("[1")
    with pytest.raises(ModelError, match=r"crude\.json: Invalid JSON: .*; download it again"):
        is_packed(tmp_path)
