"""A model that is mapped from its files: the same numbers, no copy of a packed weight, one block of them in memory at a time."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modulora_core.adapters.lora import LoRASettings, add_lora
from modulora_core.checkpoints.checkpoint import check_mapped, load_model, open_checkpoint
from modulora_core.checkpoints.mapped_blocks import BlockWindow, keep_one_block
from modulora_core.checkpoints.mapped_files import MappedFiles
from modulora_core.cli import main
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import OptionError
from modulora_core.inference.loading import open_to_run
from modulora_core.layers import PackedParameter
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.tests.adapted_models import logits, randomize
from modulora_core.tests.crude_folders import save_crude
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune
from modulora_core.training.gradient_checkpointing import checkpoint_activations

Pack = Callable[..., tuple[Path, Path]]

pytestmark = pytest.mark.usefixtures("one_thread")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped_rss(folder: Path) -> int:
    """Bytes of the folder's files that are in this process's resident set."""
    ours, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def on_file(tensor: Tensor, folder: Path) -> bool:
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]  # fmt: skip
    return any(int(start, 16) <= tensor.data_ptr() < int(stop, 16) for start, stop in ranges)


@linux_only
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_mapped_model_is_the_same_model_on_its_files(pack: Pack, architecture: str) -> None:
    _, folder = pack(architecture)
    mapped = load_model(folder, mapped=True)
    assert torch.equal(logits(mapped), logits(load_model(folder)))
    packed = [module for module in mapped.modules() if isinstance(module, PackedParameter)]
    assert packed
    assert all(
        on_file(tensor, folder) for module in packed for tensor in module.packed.tensors.values()
    )
    assert mapped.name_or_path == str(folder), "what the adapter's base is called"


@linux_only
def test_what_was_cast_is_handed_back(toy: Any, tmp_path: Path) -> None:
    """If this fails: embeddings and head of a model in another dtype are in memory twice."""
    folder = _packed_llama(tmp_path, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                           vocab_size=2**14)  # fmt: skip
    model = load_model(folder, mapped=True, dtype="bfloat16")
    table = model.get_input_embeddings().weight
    assert not on_file(table, folder)
    assert table.abs().max() > 0
    # it was 8 MiB in the file, and the head as much; of what was touched meanwhile a piece of 2 MiB may be here again
    assert mapped_rss(folder) < 4 * 2**20


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_on_a_mapped_model_changes_no_bit(
    tunable: Path, tmp_path: Path, checkpointing: bool
) -> None:
    (tmp_path / "text.txt").write_text(pydoc_text()[:1500])
    before = {file.name: file.read_bytes() for file in tunable.iterdir()}
    adapters = []
    for mapped in (False, True):
        out = tmp_path / f"adapter-{mapped}"
        config = FinetuneConfig.build({"model": str(tunable), "out": str(out), "data": str(tmp_path / "text.txt"), "steps": 2,
                                       "batch_size": 2, "grad_accum": 1, "seq_len": 32, "mapped": mapped,
                                       "gradient_checkpointing": checkpointing})  # fmt: skip
        result = finetune(config)
        adapters.append((result.losses, (out / "adapter_model.safetensors").read_bytes()))
    assert adapters[0] == adapters[1]
    assert {file.name: file.read_bytes() for file in tunable.iterdir()} == before


@linux_only
@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_block_is_in_memory_at_a_time(wide: Path, checkpointing: bool) -> None:
    """Asked when a block has been left and the next one isn't entered yet, forward and back."""
    model = load_model(wide, mapped=True)
    add_lora(model, LoRASettings(rank=2))
    randomize(model)
    if checkpointing:
        checkpoint_activations(model.train())
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(mapped_rss(wide))

    def on_output(_: nn.Module, __: Any, hidden: Tensor) -> None:
        look()
        hidden.register_hook(look)

    for block in model.model.layers:
        block.register_forward_hook(
            on_output, prepend=True
        )  # before the block that was left is dropped
    model(torch.arange(12)[None] + 3, use_cache=False).logits.sum().backward()
    blocks = len(model.model.layers)
    packed = sum(m.packed.nbytes for m in model.modules() if isinstance(m, PackedParameter))
    outside = (wide / "model.safetensors").stat().st_size - packed
    # the pages at the ends of ranges stay: two for each tensor of a block that has no neighbour of its own block
    ends = (
        2
        * 4096
        * sum(len(m.layout.tensors) for m in model.modules() if isinstance(m, PackedParameter))
    )
    assert len(seen) == 2 * blocks
    assert max(seen) < outside + 2 * packed / blocks + ends
    assert outside + 2 * packed / blocks + ends < packed / 2, (
        "or the bound above would prove nothing"
    )


@pytest.fixture(scope="module")
def wide(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 12 blocks whose packed weights are much larger than a page."""
    return _packed_llama(tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
                         num_attention_heads=4, vocab_size=64)  # fmt: skip


def _packed_llama(root: Path, **sizes: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from modulora_core.quantization.quantize import quantize

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(root / "dense")
    quantize(str(root / "dense"), root / "packed", "toy")
    return root / "packed"


def test_dropped_pages_come_back(tunable: Path) -> None:
    checkpoint = open_checkpoint(tunable)
    files, in_memory = checkpoint.mapped(), checkpoint.tensors()
    views = files.views()
    for pages in files.ranges(views):
        pages.drop()
        pages.prefetch()
    assert views.keys() == in_memory.keys()
    assert all(torch.equal(views[name], tensor) for name, tensor in in_memory.items())


def test_ranges_are_whole_pages_of_these_tensors_alone(tmp_path: Path) -> None:
    sizes = {"a": 5000, "b": 20_000, "c": 3000, "d": 9000}
    write(tmp_path / "model.safetensors", sizes, header=256)
    files = MappedFiles(SafetensorsStore(tmp_path), tmp_path)
    # data begins at 256: b is at 5256 to 25256, d at 28256 to 37256
    assert [pages.nbytes for pages in files.ranges(["b", "d"])] == [4 * 4096, 2 * 4096]
    assert [pages.nbytes for pages in files.ranges(["d", "c"])] == [2 * 4096], (
        "neighbours: 25256 to 37256"
    )
    assert files.ranges(["c"]) == []


def test_a_tensor_that_lies_askew_is_a_copy(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"odd": 3}, header=96)
    header = tmp_path / "model.safetensors"
    entries = {
        "odd": entry("U8", [3], 0, 3),
        "wide": entry("F32", [2], 3, 11),
        "none": entry("F32", [0], 11, 11),
    }
    text = json.dumps(entries).encode()
    header.write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(3) + struct.pack("<2f", 1.5, -2.0)
    )
    views = MappedFiles(SafetensorsStore(tmp_path), tmp_path).views()
    assert views["wide"].tolist() == [1.5, -2.0]
    assert views["wide"].data_ptr() % 4 == 0
    assert views["none"].shape == (0,)


def test_entering_a_block_drops_the_one_before_and_reads_on() -> None:
    told: list[tuple[str, int]] = []

    class Pages:
        def __init__(self, number: int) -> None:
            self.number = number

        def drop(self) -> None:
            told.append(("drop", self.number))

        def prefetch(self) -> None:
            told.append(("prefetch", self.number))

    window = BlockWindow([[Pages(number)] for number in range(3)])  # type: ignore[list-item]
    for block in (0, 1, 2, 2, 1, 0):
        window.enter(block)
    assert told == [
        ("drop", 0),
        ("prefetch", 2),
        ("drop", 1),
        ("drop", 2),
        ("prefetch", 0),
        ("drop", 1),
    ]


def test_a_model_without_lists_of_modules_keeps_what_it_has(tunable: Path) -> None:
    files = open_checkpoint(tunable).mapped()
    assert keep_one_block(nn.Linear(2, 2), files).inside is None


def test_what_can_not_be_mapped_is_refused(tunable: Path, tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(OptionError, match="mapped: expected the device cpu, got cuda:0"):
        check_mapped(open_checkpoint(tunable), "cuda:0")
    save_crude(tmp_path / "crude")
    with pytest.raises(
        OptionError, match="mapped: expected a checkpoint of modulora's own format, got crude"
    ):
        load_model(tmp_path / "crude", mapped=True, device="cpu")
    dense, _ = pack("llama")
    with pytest.raises(OptionError, match="mapped: expected a packed model"):
        open_to_run(str(dense), mapped=True, device="cpu")


def test_the_commands_that_run_a_model_take_mapped(
    tunable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(pydoc_text()[:1500])
    words = ["evaluate", str(tunable), "--data", str(tmp_path / "text.txt"), "--seq-len", "32"]
    told = []
    for more in ([], ["--mapped"]):
        assert main([*words, *more, "--segments", "1", "--device", "cpu", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert told[0] == told[1]
    words = ["generate", str(tunable), "with", "--raw", "--max-new-tokens", "2"]
    assert main([*words, "--mapped", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] >= 1


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, sizes: dict[str, int], *, header: int) -> None:
    """Bytes under these names, beginning at ``header`` in the file."""
    entries, start = {}, 0
    for name, size in sizes.items():
        entries[name] = entry("U8", [size], start, start + size)
        start += size
    text = json.dumps(entries).encode()
    text += b" " * (header - 8 - len(text))
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(start))
