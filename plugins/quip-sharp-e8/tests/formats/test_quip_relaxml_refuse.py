"""A published folder that cannot be read is refused when it is opened, with the reason."""

import re

import pytest
import torch

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError

QKV, OUT = "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj"
UP, DOWN = "model.layers.0.mlp.upgate_proj", "model.layers.0.mlp.down_proj"
K = "model.layers.1.self_attn.k_proj.weight"


def refused(folder, error, match):
    with pytest.raises(error, match=match):
        open_packed(folder)


@pytest.mark.parametrize(
    ("bits", "params", "match"),
    [
        (2, {"lora_rank": 64}, "lora_rank: expected 0, got 64"),
        (2, {"codebook": "E8Q12"}, "codebook: expected one of E8P12, .* got E8Q12"),
        (3, {"codebook_version": 1}, "codebook_version: expected 0 for E8P12RVQ3B, got 1"),
        (2, {"codesz": 4}, "codesz: expected 8, the weights in a code, got 4"),
        (4, {"resid_scale_override": 3.6}, r"expected -1 \(the codebook's own: 3\.45\), got 3\.6"),
    ],
    ids=str,
)
def test_params_that_are_not_implemented_are_refused_by_name(bits, params, match, relaxml, copied):
    folder = copied(bits)
    relaxml.edit_params(folder, **params)
    refused(folder, ModelError, f"quip_params of config.json: .*{match}")


def test_heads_that_do_not_make_up_the_rows_of_a_fused_layer_are_refused(relaxml, copied):
    folder = copied()
    relaxml.edit_config(folder, num_key_value_heads=1)
    match = r"qkv_proj: expected 128 \+ 32 \+ 32 rows of q_proj, k_proj, v_proj by .*, got 256"
    refused(folder, CheckpointError, match)


TENSORS = [
    (f"{QKV}.SU", None, CheckpointError, ""),
    (f"{QKV}.Qidxs", torch.zeros(248, 4).long(), CheckpointError, r".*out a multiple of 16 .*48, "),
    (f"{QKV}.SV", torch.ones(256), CheckpointError, r"expected float16 \[256\] .* float32 \[256\]"),
    (f"{UP}.fuse_scales", torch.tensor([1.0, 1e5]), CheckpointError, ".*fp16 can hold, got one ab"),
    (f"{OUT}.codebook_id", torch.tensor(17), ModelError, "expected 7, for E8P12 in .*, got 17"),
    (f"{OUT}.A", torch.zeros(4), ModelError, "expected Qidxs, .* alone .*isn't implemented"),
]


@pytest.mark.parametrize(("name", "tensor", "error", "match"), TENSORS)
def test_tensors_that_do_not_fit_are_refused(name, tensor, error, match, relaxml, copied):
    folder = copied(2)
    relaxml.change(folder, **{name: tensor})
    layer, _, part = name.rpartition(".")
    told = f"{re.escape(layer)}.*{part}" if tensor is None else f"{re.escape(name)}: {match}"
    refused(folder, error, told)


def test_a_part_that_is_stored_twice_is_refused(relaxml, copied):
    folder = copied()
    relaxml.change(folder, **{K: torch.zeros(64, 128)})
    match = rf"{QKV}: expected model\.layers\.1\.self_attn\.k_proj to be stored once"
    refused(folder, CheckpointError, match)
    parts = ("Qidxs", "SU", "SV", "Wscale", "codebook_id")
    held, gate = relaxml.stored(folder), "model.layers.1.mlp.gate_proj"
    again = {f"{gate}.{part}": held[f"{OUT}.{part}"] for part in parts}
    relaxml.change(folder, **{K: None}, **again)
    refused(folder, CheckpointError, r"expected model\.layers\.1\.mlp\.gate_proj to be stored once")


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"num_key_value_heads": 4}, r"qkv_proj: .*out_features, got 384, .*had\.12 .*\(n = 12 ·"),
        ({"head_dim": 48}, r"o_proj: .* as in_features, got 192, .*had\.12 .*\(n = 12 · 16\)"),
        ({"intermediate_size": 704}, r"mlp\.\w+_proj: .*got (704|1408), .*no matrix of theirs"),
    ],
    ids=str,
)
def test_a_folder_that_needs_a_hadamard_matrix_of_theirs_is_refused(
    sizes, match, relaxml, tmp_path
):
    relaxml.save_relaxml(tmp_path / "m", num_hidden_layers=1, meaning=False, **sizes)
    refused(tmp_path / "m", ModelError, match)
