"""A broken folder is refused before any work, and the message names the file and the fault."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modulora_core.errors import CheckpointError, ModelError, WeightError
from modulora_core.models import open_dense
from modulora_core.models.folders import INDEX
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.tests.crude_folders import edit_config
from modulora_core.tests.tiny_models import save_tiny_model

FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model("llama", tmp_path)


@pytest.fixture
def sharded(tmp_path):
    return save_tiny_model("llama", tmp_path, max_shard_size="20KB")


def edit_weights(folder, changes):
    """Replace tensors, or drop those that are None."""
    tensors = {**load_file(folder / FILE), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / FILE, {"format": "pt"})


def refused(folder, error, message):
    with pytest.raises(error, match=message):
        open_dense(str(folder)).check_whole()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no weights; expected model\.safetensors or .*got no weight files"),
        (
            ["model.pt", "pytorch_model.bin"],
            r"got model\.pt, .*\.bin\. These are pickles.*save_pre",
        ),
        (["adapter_config.json"], "holds an adapter: give its base model"),
    ],
)
def test_a_folder_without_safetensors_is_refused(files, message, folder):
    (folder / FILE).unlink()
    for name in files:
        (folder / name).write_bytes(b"not even a pickle: nothing must read it")
    refused(folder, CheckpointError, message)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_config_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    refused(folder, ModelError, r"config\.json: (Invalid JSON: |expected an object, got)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "'vit': transformers can't build a causal language model"),
        (
            {"model_type": "nonesuch", "auto_map": {"AutoConfig": "evil.Config"}},
            "needs code of its own, which is never run",
        ),
        ({"quantization_config": {"quant_method": "exotic"}}, "quantized with exotic, which"),
        (
            {"quantization_config": {"quant_method": "modulora"}},
            "quantized with modulora.*finetune",
        ),
    ],
)
def test_a_config_that_cannot_be_quantized_is_refused(changes, message, folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')\nclass Config: ...\n")
    edit_config(folder, **changes)
    refused(folder, ModelError, message)


def test_a_known_model_type_needs_no_code_of_the_folder(folder):
    edit_config(folder, auto_map={"AutoConfig": "evil.Config"}, quantization_config=None)
    open_dense(str(folder)).check_whole()


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(sharded, CheckpointError, f"got none named {shard.name}")
    many = {f"w{n}": f"{n}.safetensors" for n in range(99)}
    (sharded / INDEX).write_text(json.dumps({"weight_map": many}))
    refused(sharded, CheckpointError, r"the 99 shards of .*, got none named [^;]{200,400};")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON: "),
        ('{"weight_map": {"w": 3}}', "weight_map: w: expected"),
        ('{"weight_map": {"w": "../w.safetensors"}}', "weight_map: w: .*match pattern.*, got"),
        ('{"weight_map": {"w": "/etc/w.safetensors"}}', "weight_map: w: .*match pattern"),
    ],
)
def test_a_broken_index_is_refused(text, message, sharded):
    (sharded / INDEX).write_text(text)
    refused(sharded, CheckpointError, rf"index\.json: {message}")


def test_a_tensor_of_the_index_that_its_shard_lacks_is_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.9.norm"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, CheckpointError, r"1 tensors of the index aren't in .*model\.layers\.9\.norm")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -5000, -1])
def test_a_truncated_file_is_refused(keep, folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:keep])
    refused(folder, CheckpointError, rf"{FILE}: truncated or damaged: expected .*, got \d+ bytes")


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "llama",
            {UP: torch.zeros(48, 31)},
            rf"{UP}: expected \[48, 32\] by the config, got \[48, 31\]",
        ),
        ("llama", {"model.norm.weight": None}, r"1 of 21 parameters of Llama.*model\.norm\.weight"),
        (
            "mixtral",
            {"model.layers.0.block_sparse_moe.experts.3.w2.weight": None},
            r"down_proj: expected \[4, 32, 48\] by the config, got \[3, 32, 48\]",
        ),
        (
            "mixtral",
            {"model.layers.0.block_sparse_moe.experts.3.w1.weight": torch.zeros(47, 32)},
            r"experts\.gate_up_proj: its 8 tensors .*can't be combined",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(architecture, changes, message, tmp_path):
    save_tiny_model(architecture, tmp_path)
    edit_weights(tmp_path, changes)
    refused(tmp_path, CheckpointError, message)


def test_weights_of_another_architecture_are_refused_with_an_example(folder, tmp_path):
    save_tiny_model("gpt2", tmp_path / "other")
    (tmp_path / "other" / FILE).replace(folder / FILE)
    refused(folder, CheckpointError, r"21 of 21 .* have no place in it, such as transformer\.")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_a_tensor_with_nan_or_inf_is_named(bad, dtype, folder):
    values = torch.ones(48, 32)
    values[0, 0] = torch.finfo(dtype).max
    edit_weights(folder, {UP: values.to(dtype)})
    open_dense(str(folder)).checked_digest()
    values[47, 31] = bad
    edit_weights(folder, {UP: values.to(dtype)})
    with pytest.raises(
        WeightError, match=rf"{UP} in {FILE}: expected finite values, got NaN or Inf"
    ):
        open_dense(str(folder)).checked_digest()


def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path):
    raw = torch.arange(64, dtype=torch.uint8)
    names = ("float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "int8", "uint16")
    tensors = {name: raw.clone().view(getattr(torch, name)) for name in names}
    tensors |= {"bool": raw % 2 == 0, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / FILE)
    store = SafetensorsStore(tmp_path)
    for name, expected in tensors.items():
        read = store.read(name)
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        as_bytes = [x.reshape(-1).view(torch.uint8) for x in (read, expected)]
        assert torch.equal(*as_bytes), name


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder):
    source = open_dense(str(folder))
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="the file was changed"):
        list(source.tensors())
