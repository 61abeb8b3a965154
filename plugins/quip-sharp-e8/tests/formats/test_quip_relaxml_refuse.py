"""A published folder that cannot be read is refused when it is opened, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from modulora_core.checkpoints.convert import convert
from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError

Copied = Callable[..., Path]

QKV, OUT = "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj"
UP, DOWN = "model.layers.0.mlp.upgate_proj", "model.layers.0.mlp.down_proj"


def refused(folder: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        open_packed(folder)


# --- config.json -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "params", "match"),
    [
        (2, {"lora_rank": 64}, "lora_rank: expected 0, got 64"),
        (2, {"rescale_WH": True}, "rescale_WH: expected false, got true"),
        (2, {"codebook": "E8Q12"}, "codebook: expected one of E8P12, .* got E8Q12"),
        (2, {"codebook": None}, "codebook: "),
        (3, {"codebook_version": 1}, "codebook_version: expected 0 for E8P12RVQ3B, got 1"),
        (2, {"codesz": 4}, "codesz: expected 8, the weights in a code, got 4"),
        (3, {"packsz": 4}, r"packsz: expected 2\.667 for E8P12RVQ3B, got 4"),
        (2, {"idx_dtype": "torch.int32"}, r"idx_dtype: expected torch\.int64, got torch\.int32"),
        (4, {"resid_scale_override": 3.6}, r"expected -1 \(the codebook's own: 3\.45\), got 3\.6"),
        (2, {"resid_scale_override": 2}, "resid_scale_override: .*it has no residual"),
        (2, {"train_rotation": True}, "train_rotation: "),
    ],
    ids=str,
)
def test_params_that_are_not_implemented_are_refused_by_name(
    bits: int, params: dict[str, Any], match: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied(bits)
    relaxml.edit_params(folder, **params)
    refused(folder, ModelError, f"quip_params of config.json: .*{match}")


def test_a_layer_of_another_codebook_is_refused(relaxml: ModuleType, copied: Copied) -> None:
    folder = copied(2)
    relaxml.change(folder, **{f"{OUT}.codebook_id": torch.tensor(17)})
    refused(folder, ModelError, rf"{OUT}\.codebook_id: expected 7, for E8P12 in .*, got 17")


def test_heads_that_do_not_make_up_the_rows_of_a_fused_layer_are_refused(
    relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.edit_config(folder, num_key_value_heads=1)
    match = r"qkv_proj: expected 128 \+ 32 \+ 32 rows of q_proj, k_proj, v_proj by .*, got 256"
    refused(folder, CheckpointError, match)


# --- tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["Qidxs", "SU", "SV", "Wscale", "codebook_id", "fuse_scales"])
def test_a_missing_tensor_is_refused_by_name(
    part: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.change(folder, **{f"{QKV}.{part}": None})
    refused(folder, CheckpointError, rf"{QKV}.*{part}")


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        (f"{QKV}.Qidxs", torch.zeros(256, 4).int(), r"expected int64 .* got int32 \[256, 4\]"),
        (f"{QKV}.Qidxs", torch.zeros(1024).long(), r".*got int64 \[1024\]"),
        (f"{QKV}.Qidxs", torch.zeros(248, 4).long(), r".*out a multiple of 16 .*\[248, 4\]"),
        (f"{QKV}.Qidxs", torch.zeros(0, 4).long(), r".*got int64 \[0, 4\]"),
        (f"{QKV}.SU", torch.ones(64).half(), r"expected float16 \[128\] .* float16 \[64\]"),
        (f"{QKV}.SV", torch.ones(256), r"expected float16 \[256\] .* float32 \[256\]"),
        (f"{QKV}.Wscale", torch.ones(2), r"expected float32 \[\] .* float32 \[2\]"),
        (f"{QKV}.codebook_id", torch.tensor(7.0), r"expected int64 \[\] .* float32 \[\]"),
        (f"{UP}.fuse_scales", torch.ones(3), r"expected float32 or float16 \[2\] .*\[3\]"),
        (f"{DOWN}.fuse_scales", torch.ones(2), r"expected float32 or float16 \[1\] .*\[2\]"),
    ],
)
def test_a_tensor_of_another_dtype_or_shape_is_refused(
    name: str, tensor: Tensor, match: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.change(folder, **{name: tensor})
    refused(folder, CheckpointError, f"{re.escape(name)}: {match}")


@pytest.mark.parametrize("part", ["SU", "SV", "Wscale", "fuse_scales"])
def test_scales_that_are_not_finite_are_refused(
    part: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    tensor = relaxml.stored(folder)[f"{UP}.{part}"]
    tensor.view(-1)[-1] = float("nan")
    relaxml.change(folder, **{f"{UP}.{part}": tensor})
    refused(folder, CheckpointError, rf"{UP}\.{part}: expected finite values, got NaN or Inf")


def test_factors_whose_products_overflow_fp16_are_refused(
    relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.change(folder, **{f"{UP}.fuse_scales": torch.tensor([1.0, 1e5])})
    refused(folder, CheckpointError, rf"{UP}\.fuse_scales: .*fp16 can hold, got one above 65504")


@pytest.mark.parametrize("name", [f"{OUT}.A", f"{QKV}.bias"])
def test_a_tensor_beside_the_known_ones_is_refused(
    name: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.change(folder, **{name: torch.zeros(4)})
    refused(folder, ModelError, f"{re.escape(name)}: expected Qidxs, .* alone .*isn't implemented")


def test_a_part_that_is_stored_twice_is_refused(relaxml: ModuleType, copied: Copied) -> None:
    folder = copied()
    relaxml.change(folder, **{"model.layers.1.self_attn.k_proj.weight": torch.zeros(64, 128)})
    match = rf"{QKV}: expected model\.layers\.1\.self_attn\.k_proj to be stored once"
    refused(folder, CheckpointError, match)
    parts = ("Qidxs", "SU", "SV", "Wscale", "codebook_id")
    again = {
        f"model.layers.1.mlp.gate_proj.{part}": relaxml.stored(folder)[f"{OUT}.{part}"]
        for part in parts
    }
    relaxml.change(folder, **{"model.layers.1.self_attn.k_proj.weight": None}, **again)
    refused(folder, CheckpointError, r"expected model\.layers\.1\.mlp\.gate_proj to be stored once")


# --- dimensions and directions ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        (
            {"num_key_value_heads": 4},
            r"qkv_proj: .*out_features, got 384, .*had\.12 .*\(n = 12 · 32",
        ),
        ({"head_dim": 48}, r"o_proj: .* as in_features, got 192, .*had\.12 .*\(n = 12 · 16\)"),
        ({"intermediate_size": 704}, r"mlp\.\w+_proj: .*got (704|1408), .*no matrix of theirs"),
    ],
    ids=str,
)
def test_a_folder_that_needs_a_hadamard_matrix_of_theirs_is_refused(
    sizes: dict[str, int], match: str, relaxml: ModuleType, tmp_path: Path
) -> None:
    relaxml.save_relaxml(tmp_path / "m", num_hidden_layers=1, meaning=False, **sizes)
    refused(tmp_path / "m", ModelError, match)
    with pytest.raises(ModelError, match=match):
        convert(str(tmp_path / "m"), tmp_path / "out", "modulora")
    assert not (tmp_path / "out").exists()
