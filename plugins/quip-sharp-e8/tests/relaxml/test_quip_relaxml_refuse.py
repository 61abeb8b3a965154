"""What a published folder may not be, each told by name when it is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from modulora_quip_sharp_e8.relaxml_config import check_dimension
from torch import Tensor

from modulora_core.checkpoints.checkpoint import is_packed, open_checkpoint
from modulora_core.checkpoints.convert import convert
from modulora_core.errors import CheckpointError, ModelError, OptionError
from modulora_core.models import open_model

Copied = Callable[..., Path]

QKV, OUT = "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj"
UP, DOWN = "model.layers.0.mlp.upgate_proj", "model.layers.0.mlp.down_proj"


def refused(folder: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        open_checkpoint(folder)


# --- config.json -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "params", "match"),
    [
        (2, {"lora_rank": 64}, "lora_rank: expected 0, got 64"),
        (2, {"rescale_WH": True}, "rescale_WH: expected false, got true"),
        (2, {"codebook": "E8Q12"}, "codebook: expected one of E8P12, .* got E8Q12"),
        (2, {"codebook": None}, "codebook: "),
        (2, {"codebook_version": 0}, "codebook_version: expected 1 for E8P12, got 0"),
        (3, {"codebook_version": 1}, "codebook_version: expected 0 for E8P12RVQ3B, got 1"),
        (2, {"codebook_version": None}, "codebook_version: "),
        (2, {"codesz": 4}, "codesz: expected 8, the weights in a code, got 4"),
        (4, {"packsz": 4}, "packsz: expected 2 for E8P12RVQ4B, got 4"),
        (3, {"packsz": 4}, r"packsz: expected 2\.667 for E8P12RVQ3B, got 4"),
        (2, {"idx_dtype": "torch.int32"}, r"idx_dtype: expected torch\.int64, got torch\.int32"),
        (4, {"resid_scale_override": 3.6}, r"resid_scale_override: expected -1 \(the codebook's own: 3\.45\), got 3\.6"),
        (4, {"resid_scale_override": 2.04}, "resid_scale_override: expected -1"),
        (3, {"resid_scale_override": 0}, "resid_scale_override: expected -1"),
        (3, {"resid_scale_override": -2}, "resid_scale_override: expected -1"),
        (2, {"resid_scale_override": 2}, "resid_scale_override: .*it has no residual"),
        (2, {"train_rotation": True}, "train_rotation: "),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(
    bits: int, params: dict[str, Any], match: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied(bits)
    relaxml.edit_params(folder, **params)
    refused(folder, ModelError, f"quip_params of config.json: {match}")


def test_params_that_are_no_table_are_refused(relaxml: ModuleType, copied: Copied) -> None:
    folder = copied()
    relaxml.edit_config(folder, quip_params=["E8P12"])
    refused(folder, ModelError, "quip_params of config.json: ")


@pytest.mark.parametrize("bits", [3, 4])
def test_a_config_of_another_width_is_refused(
    bits: int, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied(2)
    name, _, version, packsz = relaxml.CODEBOOKS[bits]
    relaxml.edit_params(folder, codebook=name, codebook_version=version, packsz=packsz)
    refused(
        folder,
        CheckpointError,
        rf"Qidxs: expected int64 \[out, in · {bits} / 64\]|SU: expected float16 \[",
    )


@pytest.mark.parametrize("id", [17, 18, 0])
def test_a_layer_of_another_codebook_is_refused(
    id: int, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied(2)
    relaxml.change(folder, **{f"{OUT}.codebook_id": torch.tensor(id)})
    refused(
        folder,
        ModelError,
        rf"{OUT}\.codebook_id: expected 7, that of E8P12 in config\.json, got {id}",
    )


def test_heads_that_do_not_make_up_the_rows_of_a_fused_layer_are_refused(
    relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.edit_config(folder, num_key_value_heads=1)
    refused(
        folder,
        CheckpointError,
        r"qkv_proj: expected 128 \+ 32 \+ 32 rows of q_proj, k_proj, v_proj by config\.json, got 256",
    )


def test_a_size_that_the_config_does_not_tell_is_refused(
    relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.edit_config(folder, intermediate_size=None)
    refused(
        folder,
        ModelError,
        r"intermediate_size of config\.json: expected a positive whole number.*got None",
    )


# --- tensors ---------------------------------------------------------------------------------------------


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
        (f"{QKV}.Qidxs", torch.zeros(256, 4, dtype=torch.int32), r"expected int64 .* got int32 \[256, 4\]"),
        (f"{QKV}.Qidxs", torch.zeros(1024, dtype=torch.int64), r".*got int64 \[1024\]"),
        (f"{QKV}.Qidxs", torch.zeros(248, 4, dtype=torch.int64), r".*out a multiple of 16 .* got int64 \[248, 4\]"),
        (f"{QKV}.Qidxs", torch.zeros(256, 3, dtype=torch.int64), r".*in of 64, got int64 \[256, 3\]"),
        (f"{QKV}.Qidxs", torch.zeros(0, 4, dtype=torch.int64), r".*got int64 \[0, 4\]"),
        (f"{QKV}.SU", torch.ones(64).half(), r"expected float16 \[128\] by Qidxs and the config, got float16 \[64\]"),
        (f"{QKV}.SU", torch.ones(128), r"expected float16 \[128\] .* got float32 \[128\]"),
        (f"{QKV}.SV", torch.ones(128).half(), r"expected float16 \[256\] .* got float16 \[128\]"),
        (f"{QKV}.Wscale", torch.ones(2), r"expected float32 \[\] .* got float32 \[2\]"),
        (f"{QKV}.Wscale", torch.tensor(1.0).half(), r"expected float32 \[\] .* got float16 \[\]"),
        (f"{QKV}.codebook_id", torch.tensor(7.0), r"expected int64 \[\] .* got float32 \[\]"),
        (f"{QKV}.fuse_scales", torch.ones(2), r"expected float32 or float16 \[3\] .* got float32 \[2\]"),
        (f"{UP}.fuse_scales", torch.ones(3), r"expected float32 or float16 \[2\] .* got float32 \[3\]"),
        (f"{DOWN}.fuse_scales", torch.ones(2), r"expected float32 or float16 \[1\] .* got float32 \[2\]"),
    ],
)  # fmt: skip
def test_a_tensor_of_another_dtype_or_shape_is_refused(
    name: str, tensor: Tensor, match: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.change(folder, **{name: tensor})
    refused(folder, CheckpointError, f"{re.escape(name)}: {match}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["SU", "SV", "Wscale", "fuse_scales"])
def test_scales_that_are_not_finite_are_refused(
    part: str, bad: float, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    tensor = relaxml.stored(folder)[f"{UP}.{part}"]
    tensor.view(-1)[-1] = bad
    relaxml.change(folder, **{f"{UP}.{part}": tensor})
    refused(folder, CheckpointError, rf"{UP}\.{part}: expected finite values, got NaN or Inf")


def test_factors_whose_products_overflow_fp16_are_refused(
    relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.change(folder, **{f"{UP}.fuse_scales": torch.tensor([1.0, 1e5])})
    refused(folder, CheckpointError, rf"{UP}\.fuse_scales: .*fp16 can hold, got one above 65504")


@pytest.mark.parametrize("name", [f"{OUT}.A", f"{QKV}.bias", f"{UP}.scaleWH"])
def test_a_tensor_beside_the_known_ones_is_refused(
    name: str, relaxml: ModuleType, copied: Copied
) -> None:
    folder = copied()
    relaxml.change(folder, **{name: torch.zeros(4)})
    refused(
        folder,
        ModelError,
        f"{re.escape(name)}: the files have it beside the layer's Qidxs, .*isn't implemented",
    )


def test_a_part_that_is_stored_twice_is_refused(relaxml: ModuleType, copied: Copied) -> None:
    folder = copied()
    relaxml.change(folder, **{"model.layers.1.self_attn.k_proj.weight": torch.zeros(64, 128)})
    refused(
        folder,
        CheckpointError,
        rf"{QKV}: expected model\.layers\.1\.self_attn\.k_proj to be stored once",
    )
    again = {f"model.layers.1.mlp.gate_proj.{part}": relaxml.stored(folder)[f"{OUT}.{part}"]
             for part in ("Qidxs", "SU", "SV", "Wscale", "codebook_id")}  # fmt: skip
    relaxml.change(folder, **{"model.layers.1.self_attn.k_proj.weight": None}, **again)
    refused(folder, CheckpointError, r"expected model\.layers\.1\.mlp\.gate_proj to be stored once")


# --- dimensions and directions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"num_key_value_heads": 4}, r"qkv_proj: out_features 384 isn't a power of two.*had\.12 of Sloane's tables \(n = 12 · 32\)"),
        ({"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 1},
         r"_proj: (in|out)_features 192 isn't a power of two.*had\.12 .*\(n = 12 · 16\)"),
        ({"head_dim": 48}, r"o_proj: in_features 192 isn't a power of two.*had\.12 .*\(n = 12 · 16\)"),
        ({"intermediate_size": 448}, r"mlp\.\w+_proj: (in|out)_features (448|896) isn't a power of two.*had\.28 .*\(n = 28 · (16|32)\)"),
        ({"intermediate_size": 704}, r"mlp\.\w+_proj: (in|out)_features (704|1408) isn't a power of two.*no matrix of theirs fits"),
    ],
    ids=str,
)  # fmt: skip
def test_a_folder_that_needs_a_hadamard_matrix_of_theirs_is_refused(
    sizes: dict[str, int], match: str, relaxml: ModuleType, tmp_path: Path
) -> None:
    relaxml.save_relaxml(tmp_path / "m", num_hidden_layers=1, meaning=False, **sizes)
    refused(tmp_path / "m", ModelError, match)
    with pytest.raises(ModelError, match=match):
        convert(str(tmp_path / "m"), tmp_path / "out", "modulora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("n", "k"), [
    (5120, 20), (11008, 172), (13824, 108), (22016, 172), (17920, 140), (6656, 52), (28672, 28), (12288, 12), (15360, 60), (27648, 108),
    (576, 36), (156 * 64, 156), (124 * 64, 124), (116 * 64, 116), (172, 172),
])  # fmt: skip
def test_the_matrix_that_a_dimension_needs_is_named(n: int, k: int) -> None:
    with pytest.raises(
        ModelError,
        match=rf"model\.x: in_features {n} isn't a power of two.*had\.{k} .*\(n = {k} · {n // k}\)",
    ):
        check_dimension("model.x", "in_features", n)


@pytest.mark.parametrize("n", [64, 4096, 8192, 2**20])
def test_powers_of_two_are_read(n: int) -> None:
    check_dimension("model.x", "in_features", n)


def test_it_is_refused_as_a_model_to_quantize_with_what_to_do(copied: Copied) -> None:
    folder = copied()
    assert is_packed(folder)
    with pytest.raises(
        ModelError,
        match=r"already quantized with quip-sharp \(config\.json\).*convert \S+ OUT --to modulora",
    ):
        open_model(str(folder))


def test_writing_such_a_folder_is_refused(copied: Copied, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="format 'quip-sharp': it is only read, not written"):
        convert(str(copied()), tmp_path / "out", "quip-sharp")
