"""Published folders, written bit by bit, as our model."""

import json
from collections import Counter

import pytest
import torch
from modulora_quip_sharp_e8 import FORMATS
from modulora_quip_sharp_e8.formats.relaxml import Relaxml

from modulora_core.hf.load_model import load_model
from modulora_core.layers import QuantLinear
from modulora_core.spec import TensorLayout
from modulora_core.tests.fuzzing import refused_or_runs
from modulora_core.tests.other_tools import assert_used, logits
from modulora_core.tests.tiny_tokenizer import make_tokenizer

ATTENTION = "model.layers.1.self_attn"


def check(folder, dense, relaxml):
    """Each layer has the weight of its codes, computed in fp64, and the logits agree."""
    model = load_model(folder, dtype="float32", device="cpu")
    names = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            names.append(name)
            packed = module.weight.packed
            W = module.weight.quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float32)
            torch.testing.assert_close(
                W, dense.get_submodule(name).weight, rtol=1e-5, atol=1e-6, msg=name
            )
    assert names == [name for name, _ in dense.named_modules() if name.endswith("proj")]
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_width_is_read(bits, relaxml, published):
    check(*published(bits), relaxml)


def test_optional_keys_and_shapes_are_read(relaxml, tmp_path):
    dense = relaxml.save_relaxml(tmp_path / "m", 2, tuned=False, num_hidden_layers=1)
    relaxml.edit_config(tmp_path / "m", head_dim=None)
    relaxml.edit_params(
        tmp_path / "m", packsz=None, codesz=None, resid_scale_override=None, idx_dtype="int64"
    )
    prefix = "model.layers.0"
    scale = relaxml.stored(tmp_path / "m")[f"{prefix}.mlp.down_proj.Wscale"]
    relaxml.change(
        tmp_path / "m",
        **{
            f"{prefix}.mlp.down_proj.Wscale": scale.view(1) / 2,
            f"{prefix}.mlp.down_proj.fuse_scales": torch.tensor([2.0], dtype=torch.float16),
        },
    )
    check(tmp_path / "m", dense, relaxml)


def test_parts_are_windows_on_one_whole_that_is_read_once(relaxml, published):
    folder, _ = published(3)
    tensors, reads = relaxml.stored(folder), Counter[str]()

    def read(name):
        reads[name] += 1
        return tensors[name]

    layouts = {name: TensorLayout.of(tensor) for name, tensor in tensors.items()}
    config = json.loads((folder / "config.json").read_text())
    weights = Relaxml(FORMATS[0]).weights(config, layouts, read)
    assert not any("Qidxs" in name for name in reads)
    parts = {
        name: weights[f"{ATTENTION}.{name}"].unpack(read) for name in ("q_proj", "k_proj", "v_proj")
    }
    assert reads[f"{ATTENTION}.qkv_proj.Qidxs"] == 1
    assert {name: (p.shape, list(p.metadata["rows"])) for name, p in parts.items()} == {
        "q_proj": ((128, 128), [0, 256]),
        "k_proj": ((64, 128), [128, 256]),
        "v_proj": ((64, 128), [192, 256]),
    }
    addresses = {tuple(t.data_ptr() for t in part.tensors.values()) for part in parts.values()}
    assert len(addresses) == 1
    other = weights["model.layers.0.mlp.gate_proj"].unpack(read)
    assert (other.shape, list(other.metadata["rows"])) == ((256, 128), [256, 512])
    assert all(weight.layout == weight.unpack(read).layout for weight in weights.values())


def test_a_folder_is_converted_merged_finetuned_and_asked(copied, tmp_path):
    folder = copied(2)
    make_tokenizer().save_pretrained(folder)
    assert_used(folder, tmp_path)


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(relaxml, tmp_path):
    relaxml.save_relaxml(tmp_path / "E8P-2Bit", 2)
    refused_or_runs(tmp_path / "E8P-2Bit")
