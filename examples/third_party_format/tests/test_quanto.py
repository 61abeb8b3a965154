"""Folders in optimum-quanto's layout are models: opened, run, converted, or refused."""

import json

import pytest
import torch
from modulora_convert.convert import convert
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modulora_core import add_lora, load_model
from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError

IDS = torch.arange(24).view(2, 12)
UP = "model.layers.0.mlp.up_proj"
QMAP = "quanto_qmap.json"


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path):
    """A folder as quanto writes it."""
    dense, found = llama(), tmp_path / "quanto"
    dense.save_pretrained(found)
    stored, qmap = load_file(found / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith("proj.weight")]:
        W, module = stored.pop(name), name.removesuffix(".weight")
        scale = W.abs().amax(dim=1, keepdim=True) / 127
        stored[f"{name}._data"] = (W / scale).round().to(torch.int8)
        stored[f"{name}._scale"] = scale
        stored |= {f"{module}.{side}_scale": torch.tensor(1.0) for side in ("input", "output")}
        qmap[module] = {"weights": "qint8", "activations": "none"}
    save_file(stored, found / "model.safetensors", {"format": "pt"})
    (found / QMAP).write_text(json.dumps(qmap))
    return found


def test_a_folder_is_a_model(folder, tmp_path):
    checkpoint = open_packed(folder)
    assert (checkpoint.format, len(checkpoint.record.weights)) == ("quanto", 14)
    model = load_model(checkpoint, dtype="float32", device="cpu")
    dense = llama()
    for name, module in dense.named_modules():
        if name.endswith("proj"):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = (module.weight.detach() / scale).round() * scale
    torch.testing.assert_close(logits(model), logits(dense))
    convert(str(folder), tmp_path / "ours", "modulora")
    assert torch.equal(logits(load_model(tmp_path / "ours", device="cpu")), logits(model))


def test_it_trains(folder):
    model = load_model(folder, device="cpu")
    add_lora(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads
    assert all(grad.norm() > 0 for grad in grads)


def test_other_weights_than_qint8_are_refused(folder):
    qmap = json.loads((folder / QMAP).read_text())
    (folder / QMAP).write_text(json.dumps(qmap | {UP: {"weights": "qint4"}}))
    with pytest.raises(ModelError, match="up_proj: expected weights of qint8, got 'qint4'"):
        open_packed(folder)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("_data", None, r"up_proj.weight._data: expected int8 \[out, in\], got nothing"),
        ("_data", torch.zeros(48, 32), "expected int8 .* got float32"),
        ("_scale", torch.ones(3, 1), r"_scale: expected float32 \[48, 1\] by .* got float32 \[3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, part, value, message):
    stored = load_file(folder / "model.safetensors")
    stored.pop(f"{UP}.weight.{part}")
    if value is not None:
        stored[f"{UP}.weight.{part}"] = value
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        open_packed(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_of_quanto_gives_its_logits(dtype, tmp_path):
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = llama().to(dtype)
    theirs = quanto.QuantizedModelForCausalLM.quantize(model, weights=quanto.qint8)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=dtype, device="cpu")
    error = logits(ours) - logits(theirs)
    assert error.norm() < (1e-6 if dtype == torch.float32 else 0.02) * logits(theirs).norm()
