"""Files written a tensor at a time are safetensors files, and a stopped run can go on."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modulora_core.checkpoints.shards import JOURNAL, ShardWriter, plan_shards
from modulora_core.errors import CheckpointError, WorkError
from modulora_core.models.folders import INDEX
from modulora_core.spec import TensorLayout

TENSORS = {
    "a.weight": torch.arange(7, dtype=torch.uint8),
    "b.weight": torch.randn(3, 5),
    "b.bias": torch.randn(3).to(torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
}


def layouts(tensors):
    return {name: TensorLayout.of(tensor) for name, tensor in tensors.items()}


def assert_written(folder):
    read: dict[str, Tensor] = {}
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        read |= load_file(file)
        weight_map |= dict.fromkeys(load_file(file), file.name)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    if len(set(weight_map.values())) > 1:
        assert json.loads((folder / INDEX).read_text())["weight_map"] == weight_map
    assert not (folder / JOURNAL).exists()


@pytest.mark.parametrize("max_bytes", [10**9, 60, 1])
def test_the_safetensors_library_reads_the_files_bit_for_bit(tmp_path, max_bytes):
    writer = ShardWriter(tmp_path, plan_shards(layouts(TENSORS), max_bytes))
    for name in reversed(TENSORS):  # any order
        writer.write(name, {name: TENSORS[name]})
    writer.finish()
    assert_written(tmp_path)


def test_a_file_is_larger_than_the_limit_only_for_one_tensor():
    sizes = {f"t{i}": TensorLayout("float32", (n,)) for i, n in enumerate([10, 10, 100, 5, 5])}
    shards = plan_shards(sizes, 80)
    assert [list(shard.tensors) for shard in shards] == [["t0", "t1"], ["t2"], ["t3", "t4"]]


@pytest.mark.parametrize("wrong", [torch.randn(5, 3), torch.randn(3, 5).half()])
def test_another_shape_or_dtype_than_planned_is_an_error(wrong, tmp_path):
    writer = ShardWriter(tmp_path, plan_shards(layouts(TENSORS)))
    with pytest.raises(WorkError, match=r"b\.weight: planned"):
        writer.write("b.weight", {"b.weight": wrong})


def test_a_stopped_run_goes_on(tmp_path):
    shards = plan_shards(layouts(TENSORS), 60)
    first = ShardWriter(tmp_path, shards)
    first.write("a.weight", {"a.weight": TENSORS["a.weight"]})
    first.write("b", {name: TENSORS[name] for name in ("b.weight", "b.bias")})
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('"empt')  # the kill came here
    second = ShardWriter(tmp_path, shards, resume=True)
    assert second.done == {"a.weight", "b"}
    assert torch.equal(second.read("b.bias"), TENSORS["b.bias"])
    for name in ("empty", "scalar", "flags"):
        second.write(name, {name: TENSORS[name]})
        assert torch.equal(second.read(name), TENSORS[name])
    second.finish()
    assert_written(tmp_path)


@pytest.mark.parametrize("bad", [b"\x01", b"\x00" * 15])
def test_a_parameter_whose_bytes_changed_is_written_again(tmp_path, bad):
    shards = plan_shards(layouts(TENSORS))
    first = ShardWriter(tmp_path, shards)
    for name in ("a.weight", "b.weight"):
        first.write(name, {name: TENSORS[name]})
    path, offset, _ = first._places["b.weight"]
    with path.open("r+b") as file:
        file.seek(offset + 3)
        file.write(bad)
    assert ShardWriter(tmp_path, shards, resume=True).done == {"a.weight"}


def test_resuming_over_other_files_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, plan_shards(layouts(TENSORS)))
    writer.write("flags", {"flags": TENSORS["flags"]})
    other = plan_shards(layouts({**TENSORS, "b.weight": torch.randn(4, 5)}))
    with pytest.raises(CheckpointError, match="without --resume"):
        ShardWriter(tmp_path, other, resume=True)
