"""A broken folder is refused before any work, and the message says what is wrong with which file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modulora_core.errors import CheckpointError, ModelError, WeightError
from modulora_core.models import open_model
from modulora_core.models.safetensors_store import SafetensorsStore, read_header
from modulora_core.models.store import CHUNK_BYTES
from modulora_core.tests.tiny_models import save_tiny_model

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
STORED_DTYPES = [
    *FLOATS,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path, max_shard_size="20KB")


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def edit_weights(folder: Path, **values: torch.Tensor | None) -> None:
    """Replace tensors, or drop those that are None; ``__`` in a name stands for a dot."""
    tensors = load_file(folder / FILE)
    for name, value in values.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / FILE, {"format": "pt"})


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# -- the folder


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / FILE).unlink()
    with pytest.raises(
        CheckpointError, match=r"no weights; expected model\.safetensors or .*got no weight files"
    ):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_of_pickles_is_refused_with_how_to_convert(name: str, folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / name).write_bytes(b"not even a pickle: nothing must read it")
    with pytest.raises(CheckpointError, match=rf"got {name}\. These are pickles.*save_pretrained"):
        open_model(str(folder))


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json; expected a folder"):
        open_model(str(folder))


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter: give its base model"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_config_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json: expected"):
        open_model(str(folder))


def test_an_unknown_model_type_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="nonesuch")
    with pytest.raises(
        ModelError, match=r"config\.json: transformers can't use this config: .*nonesuch"
    ):
        open_model(str(folder))


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')\nclass Config: ...\n")
    edit_config(folder, model_type="nonesuch", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelError, match="needs code of its own, which is never run"):
        open_model(str(folder))


def test_a_known_model_type_needs_no_code_of_the_folder(folder: Path) -> None:
    edit_config(
        folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )
    assert open_model(str(folder)).validate() == []


def test_a_model_that_is_no_causal_language_model_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="vit")
    with pytest.raises(ModelError, match="'vit': transformers can't build a causal language model"):
        open_model(str(folder))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_a_quantized_model_is_refused_with_its_method(method: str, folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=f"quantized with {method}.*[gG]ive the original model"):
        open_model(str(folder))


def test_our_own_quantized_model_is_refused_with_what_it_is_good_for(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "modulora"})
    with pytest.raises(
        ModelError, match=r"already quantized by modulora.*finetune, generate, chat"
    ):
        open_model(str(folder))


def test_a_quantized_language_part_of_a_larger_model_is_refused(folder: Path) -> None:
    edit_config(folder, text_config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ModelError, match="quantized with awq, which"):
        open_model(str(folder))


def test_a_quantization_config_of_null_is_none(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    assert open_model(str(folder)).validate() == []


# -- shards and index


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        open_model(str(sharded))


def test_a_tensor_of_the_index_that_its_shard_lacks_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.9.norm"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"1 tensors of the index aren't in .*model\.layers\.9\.norm"
    ):
        open_model(str(sharded))


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x.bin", 3]
)
def test_an_index_cannot_lead_out_of_its_folder(file: Any, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(CheckpointError, match=r"expected \.safetensors files of this folder, got"):
        open_model(str(sharded))


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: (expected|the index names no)"):
        open_model(str(sharded))


# -- one file


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_file_is_refused_with_its_sizes(cut: int, folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-cut])
    expected = rf"{FILE}: truncated: expected {len(data)} bytes, got {len(data) - cut}"
    with pytest.raises(CheckpointError, match=expected):
        open_model(str(folder))


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_a_file_cut_in_its_header_is_refused(size: int, folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:size])
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated"):
        open_model(str(folder))


def test_a_file_that_is_too_long_is_refused(folder: Path) -> None:
    with (folder / FILE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        open_model(str(folder))


@pytest.mark.parametrize("header", [b"{broken", b"\xff\xfe{}", [1, 2]])
def test_a_broken_header_is_refused(header: Any, folder: Path) -> None:
    write_safetensors(folder / FILE, header)
    with pytest.raises(CheckpointError, match="broken header"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2]}, "broken header entry of w"),
        ("F32", "broken header entry of w"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "expected whole numbers"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "expected 8 bytes"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "expected 12 bytes"),
        (
            {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]},
            "dtype of w: expected one of .*got 'Q4'",
        ),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "dtype of w"),
    ],
)
def test_a_broken_header_entry_is_refused(entry: Any, message: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / FILE, {"w": entry}, bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / FILE)


# -- what the config says


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    edit_weights(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(48, 31))
    source = open_model(str(folder))
    message = (
        r"model\.layers\.1\.mlp\.up_proj\.weight: expected \[48, 32\] by the config, got \[48, 31\]"
    )
    with pytest.raises(CheckpointError, match=message):
        source.validate()


def test_a_missing_parameter_is_named(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=None)
    with pytest.raises(
        CheckpointError, match=r"1 of 21 parameters of LlamaForCausalLM.*model\.norm\.weight"
    ):
        open_model(str(folder)).validate()


def test_more_layers_in_the_config_than_in_the_files_is_an_error(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"9 of 30 parameters.*model\.layers\.2\."):
        open_model(str(folder)).validate()


def test_weights_of_another_architecture_are_refused_with_examples_of_both(
    folder: Path, tmp_path: Path
) -> None:
    save_tiny_model("gpt2", tmp_path / "other")
    (folder / FILE).write_bytes((tmp_path / "other" / FILE).read_bytes())
    with pytest.raises(
        CheckpointError, match=r"21 of 21 param.* have no place in it, such as transformer\."
    ):
        open_model(str(folder)).validate()


def test_an_expert_that_is_missing_is_an_error(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path)
    name = "model__layers__0__block_sparse_moe__experts__3__w2__weight"
    assert name.replace("__", ".") in load_file(tmp_path / FILE)
    edit_weights(tmp_path, **{name: None})
    message = r"layers\.0\.mlp\.experts\.down_proj: expected \[4, 32, 48\] by the config, got \[3, 32, 48\]"
    with pytest.raises(CheckpointError, match=message):
        open_model(str(tmp_path)).validate()


def test_experts_of_different_shapes_are_an_error(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path)
    edit_weights(
        tmp_path, model__layers__0__block_sparse_moe__experts__3__w1__weight=torch.zeros(47, 32)
    )
    with pytest.raises(
        CheckpointError, match=r"experts\.gate_up_proj: its 8 tensors .*can't be combined"
    ):
        open_model(str(tmp_path))


# -- values


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_are_found_and_their_tensor_is_named(
    bad: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_tiny_model("mixtral", tmp_path, dtype)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = load_file(tmp_path / FILE)
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    source = open_model(str(tmp_path))
    source.validate()
    with pytest.raises(
        WeightError, match=rf"{name} in {FILE}: expected finite values, got NaN or Inf"
    ):
        source.check_finite()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_is_found_in_8_bit_floats(dtype: torch.dtype, folder: Path) -> None:
    values = torch.ones(48, 32)
    edit_weights(folder, model__layers__1__mlp__up_proj__weight=values.to(dtype))
    open_model(str(folder)).check_finite()
    values[47, 31] = torch.nan
    edit_weights(folder, model__layers__1__mlp__up_proj__weight=values.to(dtype))
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        open_model(str(folder)).check_finite()


def test_the_largest_finite_values_are_finite(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=torch.full((32,), torch.finfo(torch.float32).max))
    open_model(str(folder)).check_finite()


# -- reading


@pytest.mark.parametrize(
    "shape", [(), (0, 3), (5,), (3, CHUNK_BYTES // 4), (2, CHUNK_BYTES // 8 + 1)]
)
def test_a_tensor_and_its_chunks_are_what_safetensors_reads(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file(
        {"a": torch.ones(3), "w": expected, "z": torch.ones(2, dtype=torch.int64)}, tmp_path / FILE
    )
    store = SafetensorsStore(tmp_path)
    assert torch.equal(store.read("w"), expected)
    chunks = [chunk.clone() for chunk in store.chunks("w")]
    assert all(chunk.numel() * 4 <= CHUNK_BYTES for chunk in chunks)
    assert torch.equal(torch.cat([torch.empty(0), *chunks]), expected.view(-1))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_every_dtype_is_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    expected = (raw % 2).bool() if dtype == torch.bool else raw.view(dtype)
    save_file({"w": expected}, tmp_path / FILE)
    read = SafetensorsStore(tmp_path).read("w")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), expected.view(torch.uint8))


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder: Path) -> None:
    source = open_model(str(folder))
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="the file was changed"):
        list(source.tensors())
