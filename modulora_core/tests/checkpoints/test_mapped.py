"""A mapped model gives the same numbers, copies no packed weight, and holds one block at a time."""

import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modulora_core.checkpoints.mapped import MappedFiles
from modulora_core.checkpoints.opening import open_packed
from modulora_core.cli import main
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import OptionError
from modulora_core.hf.load_model import check_mapped, load_model
from modulora_core.inference.opened import open_to_run
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.packed_parameters import PackedParameter
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import logits, randomize
from modulora_core.tests.crude_folders import save_crude
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune
from modulora_core.training.gradient_checkpointing import checkpoint_activations

pytestmark = pytest.mark.usefixtures("one_thread")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped_rss(folder):
    """Bytes of the folder's files in this process's resident set."""
    ours, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def on_file(tensor, folder):
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if str(folder) in line]
    return any(int(start, 16) <= tensor.data_ptr() < int(stop, 16) for start, stop in ranges)


def packed_llama(root, **sizes):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(root / "dense")
    quantize(str(root / "dense"), root / "packed", "toy")
    return root / "packed"


def packed_modules(model):
    return [module for module in model.modules() if isinstance(module, PackedParameter)]


@linux_only
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_mapped_model_is_the_same_model_on_its_files(pack, architecture):
    _, folder = pack(architecture)
    mapped = load_model(folder, mapped=True)
    assert torch.equal(logits(mapped), logits(load_model(folder)))
    for module in packed_modules(mapped):
        assert all(on_file(tensor, folder) for tensor in module.packed.tensors.values())
    assert mapped.name_or_path == str(folder), "the name of the adapter's base"


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_on_a_mapped_model_changes_no_bit(tunable, tmp_path, checkpointing):
    (tmp_path / "text.txt").write_text(pydoc_text()[:1500])
    before = {file.name: file.read_bytes() for file in tunable.iterdir()}
    adapters = []
    for mapped in (False, True):
        out = tmp_path / f"adapter-{mapped}"
        result = finetune(FinetuneConfig.build({
            "model": str(tunable), "out": str(out), "data": str(tmp_path / "text.txt"), "steps": 2,
            "batch_size": 2, "grad_accum": 1, "seq_len": 32, "mapped": mapped, "baseline": False,
            "gradient_checkpointing": checkpointing,
        }))  # fmt: skip
        adapters.append((result.losses, (out / "adapter_model.safetensors").read_bytes()))
    assert adapters[0] == adapters[1]
    assert {file.name: file.read_bytes() for file in tunable.iterdir()} == before


@linux_only
@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_block_is_in_memory_at_a_time(toy, tmp_path, checkpointing):
    """Measured after each block, before the next one is entered, forward and back."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    folder = packed_llama(tmp_path, **sizes, vocab_size=64)
    model = load_model(folder, mapped=True)
    add_lora(model, LoRASettings(rank=2))
    randomize(model)
    if checkpointing:
        checkpoint_activations(model.train())
    seen = []

    def look(*_):
        seen.append(mapped_rss(folder))

    def on_output(_, __, hidden):
        look()
        hidden.register_hook(look)

    for block in model.model.layers:
        block.register_forward_hook(on_output, prepend=True)  # before its pages are dropped
    model(torch.arange(12)[None] + 3, use_cache=False).logits.sum().backward()
    modules, blocks = packed_modules(model), len(model.model.layers)
    packed = sum(module.packed.nbytes for module in modules)
    outside = (folder / "model.safetensors").stat().st_size - packed
    ends = 2 * 4096 * sum(len(module.layout.tensors) for module in modules)  # pages that are shared
    bound = outside + 2 * packed / blocks + ends
    assert len(seen) == 2 * blocks
    assert max(seen) < bound
    assert bound < packed / 2, "or the bound would prove nothing"


def test_a_tensor_that_is_not_aligned_or_empty_is_a_copy(tmp_path):
    entries = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "none": {"dtype": "F32", "shape": [0], "data_offsets": [11, 11]},
    }
    text = json.dumps(entries).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(3) + struct.pack("<2f", 1.5, -2.0)
    (tmp_path / "model.safetensors").write_bytes(data)
    views = MappedFiles(SafetensorsStore(tmp_path), tmp_path).views()
    assert views["wide"].tolist() == [1.5, -2.0]
    assert views["wide"].data_ptr() % 4 == 0
    assert views["none"].shape == (0,)


def test_a_model_that_cannot_be_mapped_is_refused(tunable, tmp_path, pack):
    with pytest.raises(OptionError, match="mapped: expected the device cpu, got cuda:0"):
        check_mapped(open_packed(tunable), "cuda:0")
    save_crude(tmp_path / "crude")
    with pytest.raises(OptionError, match="mapped: expected a checkpoint of modulora's own format"):
        load_model(tmp_path / "crude", mapped=True, device="cpu")
    dense, _ = pack("llama")
    with pytest.raises(OptionError, match="mapped: expected a packed model"):
        open_to_run(str(dense), mapped=True, device="cpu")


def test_a_command_that_runs_a_model_takes_mapped(tunable, capsys):
    generate = ["generate", str(tunable), "with", "--raw", "--max-new-tokens", "4", "--json"]
    told = []
    for more in ([], ["--mapped"]):
        assert main([*generate, *more, "--device", "cpu"]) == 0
        told.append(json.loads(capsys.readouterr().out)["text"])
    assert told[0] == told[1]
