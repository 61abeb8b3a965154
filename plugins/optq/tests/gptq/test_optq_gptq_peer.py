"""GPTQModel on the CPU and this plugin read each other's folders: the same weights and logits.

GPTQModel is no dependency: `pip install gptqmodel` to run these tests. It patches other libraries
when it is imported, so it runs in another process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from modulora_convert.convert import convert

from modulora_core.hf.load_model import load_model
from modulora_core.layers import QuantLinear
from modulora_core.tests.tiny_tokenizer import make_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gptqmodel") is None, reason="the peer, gptqmodel, isn't installed"
    ),
]

QUANTIZE = """
import sys, torch
from gptqmodel import GPTQModel, QuantizeConfig
source, out, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(3, 90, (32,), generator=generator).tolist() for _ in range(8)]
model = GPTQModel.load(source, QuantizeConfig(**options))
model.quantize([{"input_ids": row, "attention_mask": [1] * 32} for row in rows], batch_size=4)
model.save(out)
"""

READ = """
import sys, torch
from gptqmodel import GPTQModel, BACKEND
options = {"backend": BACKEND.GPTQ_TORCH, "device": "cpu", "dtype": torch.float16}
model = GPTQModel.load(sys.argv[1], **options).model
layers = {n: m for n, m in model.named_modules() if hasattr(m, "qweight")}
weights = {n: m.dequantize_weight().T.contiguous().clone() for n, m in layers.items()}
with torch.no_grad():
    logits = model(torch.arange(3, 27).view(2, 12)).logits
torch.save({"weights": weights, "logits": logits}, sys.argv[2])
"""

VARIANTS: list[dict[str, Any]] = [
    {"bits": 2, "group_size": 16, "sym": False, "desc_act": False, "format": "gptq"},
    {"bits": 3, "group_size": 16, "sym": False, "desc_act": True, "format": "gptq_v2"},
    {"bits": 4, "group_size": 16, "sym": True, "desc_act": True, "format": "gptq"},
    {"bits": 8, "group_size": 32, "sym": True, "desc_act": False, "format": "gptq"},
]


def peer(folder: Path, script: str, *words: str) -> None:
    """Run a script in ``folder``, where the peer leaves its logs. Paths are absolute."""
    environment = {
        **os.environ,
        "GPTQMODEL_CPU_WORKERS": "2",
    }  # without it, it crashes on two cores
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def read_by_peer(folder: Path) -> dict[str, Any]:
    out = folder.with_name(folder.name + ".pt")
    peer(folder.parent, READ, str(folder), str(out))
    return torch.load(out)  # type: ignore[no-any-return]


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The peer computes in fp16 throughout, which a percent of the largest logit allows for."""
    assert theirs.dtype == torch.float16
    assert (ours - theirs.float()).abs().max() < 0.01 * ours.abs().max()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_peers_folder_has_the_peers_weights_here(
    options: dict[str, Any], gptq: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = gptq.LlamaForCausalLM(gptq.LlamaConfig(**gptq.SIZES | {"vocab_size": 600}))
    for name, parameter in dense.named_parameters():
        if "proj" in name:
            parameter.data[::3] = parameter.data[::3].abs()  # rows whose zero is 0
    dense.half().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    peer(tmp_path, QUANTIZE, str(tmp_path / "dense"), str(tmp_path / "theirs"), repr(options))
    theirs = read_by_peer(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours", "modulora")
    model = load_model(tmp_path / "ours", dtype="float32", device="cpu")
    ours = {
        name: module.weight.quantizer.dequantize_tile(
            module.weight.packed, (0, module.out_features), torch.float16
        )
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }
    assert ours.keys() == theirs["weights"].keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs["weights"][name])] == []
    assert_same_logits(gptq.logits(model), theirs["logits"])


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    "kind",
    [{"bits": 2}, {"bits": 3, "permuted": True}, {"symmetric": True}, {"bits": 8, "head": True}],
    ids=str,
)
def test_our_folder_has_our_weights_at_the_peer(
    kind: dict[str, Any], version: str, gptq: ModuleType, tmp_path: Path
) -> None:
    dense = gptq.save_gptq(tmp_path / "start", vocab_size=608, **kind)
    make_tokenizer().save_pretrained(tmp_path / "start")
    convert(str(tmp_path / "start"), tmp_path / "ours", "modulora")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", version)
    read = read_by_peer(tmp_path / "theirs")
    assert len(read["weights"]) == 7 + ("head" in kind)
    for name, weight in read["weights"].items():
        assert torch.equal(weight, dense.get_submodule(name).weight.half()), name
    assert_same_logits(gptq.logits(dense), read["logits"])
