from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from modulora_core.checkpoints.shards import JOURNAL, ShardWriter, plan_shards
from modulora_core.errors import CheckpointError, WorkError
from modulora_core.models.safetensors_store import INDEX
from modulora_core.spec import TensorLayout

TENSORS = {
    "a.weight": torch.arange(7, dtype=torch.uint8),
    "b.weight": torch.randn(3, 5),
    "b.bias": torch.randn(3).to(torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
}


def layouts(tensors: dict[str, Tensor]) -> dict[str, TensorLayout]:
    return {name: TensorLayout.of(t) for name, t in tensors.items()}


def write_all(folder: Path, tensors: dict[str, Tensor], max_bytes: int) -> None:
    writer = ShardWriter(folder, plan_shards(layouts(tensors), max_bytes))
    for name in reversed(tensors):  # any order
        writer.write(name, {name: tensors[name]})
    writer.finish()


@pytest.mark.parametrize("max_bytes", [10**9, 60, 1])
def test_the_safetensors_library_reads_what_was_written_bit_for_bit(
    tmp_path: Path, max_bytes: int
) -> None:
    write_all(tmp_path, TENSORS, max_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    if len(files) > 1:
        weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        for name, file in weight_map.items():
            with safe_open(tmp_path / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118 - safe_open is no mapping
    assert not (tmp_path / JOURNAL).exists()


def test_files_stay_below_the_largest_size_unless_one_tensor_is_larger() -> None:
    shards = plan_shards(
        {f"t{i}": TensorLayout("float32", (n,)) for i, n in enumerate([10, 10, 100, 5, 5])}, 80
    )
    assert [list(s.tensors) for s in shards] == [["t0", "t1"], ["t2"], ["t3", "t4"]]


def test_every_tensor_is_aligned_to_its_dtype() -> None:
    (shard,) = plan_shards(layouts(TENSORS))
    width = {"float64": 8, "float32": 4, "bfloat16": 2, "uint8": 1, "bool": 1}
    assert all(start % width[layout.dtype] == 0 for _, start, layout in shard.places())
    assert len(shard.header()) % 8 == 0


def test_another_shape_or_dtype_than_planned_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, plan_shards(layouts(TENSORS)))
    for wrong in (torch.randn(5, 3), torch.randn(3, 5).half()):
        with pytest.raises(WorkError, match=r"b\.weight: planned"):
            writer.write("b.weight", {"b.weight": wrong})


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    shards = plan_shards(layouts(TENSORS), 60)
    first = ShardWriter(tmp_path, shards)
    first.write("a.weight", {"a.weight": TENSORS["a.weight"]})
    first.write("b", {name: TENSORS[name] for name in ("b.weight", "b.bias")})
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('"empt')  # the kill came here
    second = ShardWriter(tmp_path, shards, resume=True)
    assert second.done == {"a.weight", "b"}
    for name in ("empty", "scalar", "flags"):
        second.write(name, {name: TENSORS[name]})
    second.finish()
    read = {
        name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()
    }
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_resuming_over_other_files_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, plan_shards(layouts(TENSORS)))
    writer.write("flags", {"flags": TENSORS["flags"]})
    other = plan_shards(layouts({**TENSORS, "b.weight": torch.randn(4, 5)}))
    with pytest.raises(CheckpointError, match="without --resume"):
        ShardWriter(tmp_path, other, resume=True)
