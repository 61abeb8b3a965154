"""PEFT's file format, both ways: against `peft` itself, on the dense models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from modulora_core.adapters.lora import (
    LoRASettings,
    adapter_deltas,
    adapter_layers,
    add_lora,
    load_adapter,
    save_adapter,
)
from modulora_core.adapters.merge import merge
from modulora_core.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from modulora_core.adapters.record import RECORD_FILE
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.errors import AdapterError
from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.tests.adapted_models import logits, randomize, trained

Pack = Callable[..., tuple[Path, Path]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama(pack: Pack) -> nn.Module:
    return load_model(pack("llama")[1])


# PEFT reads what is written here


@pytest.mark.parametrize("architecture", ["llama", "llama-biased", "gpt2", "phi3", "gemma"])
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_peft_gives_the_same_logits_on_the_original_model(
    pack: Pack, architecture: str, targets: str, tmp_path: Path
) -> None:
    """``verbatim`` keeps every weight, so the two models differ in the adapter's code alone."""
    dense, packed = pack(architecture)
    model = load_model(packed)
    paths = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
    settings = LoRASettings(
        rank=4, targets=("all-linear",) if targets == "all-linear" else tuple(paths[1:4])
    )
    trained(model, settings)
    save_adapter(model, tmp_path / "adapter", base=str(dense))

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(dense), tmp_path / "adapter"
    )
    ours, base = logits(model), logits(AutoModelForCausalLM.from_pretrained(dense))
    adapted = {
        name
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    expected = paths if targets == "all-linear" else paths[1:4]
    assert adapted == {f"base_model.model.{path}" for path in expected}
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().max() > 0.05, "an adapter that does nothing would pass"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_gives_the_same_logits_as_the_merged_model(
    pack: Pack, architecture: str, tmp_path: Path
) -> None:
    dense, packed = pack(architecture)
    save_adapter(trained(load_model(packed)), tmp_path / "adapter")
    merge(str(packed), tmp_path / "merged", adapter=str(tmp_path / "adapter"), dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(dense), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-5)


def test_ranks_and_scales_that_differ_from_layer_to_layer_reach_peft(
    pack: Pack, tmp_path: Path
) -> None:
    dense, packed = pack("llama")
    model = load_model(packed)
    add_lora(model, LoRASettings(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    odd = dict(adapter_layers(model))["model.layers.1.self_attn.v_proj"]
    for values in (odd.lora_A, odd.lora_B, odd.scale):
        del values["default"]
    odd.active.clear()
    odd.add_adapter("default", 2, alpha=3.0)
    randomize(model)
    save_adapter(model, tmp_path, base=str(dense))

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == {"model.layers.1.self_attn.v_proj": 2}
    assert config["alpha_pattern"] == {"model.layers.1.self_attn.v_proj": 3}
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    again = load_model(packed)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_the_names_of_targets_never_reach_a_layer_that_was_left_dense(
    pack: Pack, tmp_path: Path
) -> None:
    """With the first layer's up_proj dense, the name ``up_proj`` alone would adapt it too."""
    dense, packed = pack("llama", exclude=("model.layers.0.mlp.up_proj",))
    model = trained(load_model(packed))
    save_adapter(model, tmp_path, base=str(dense))
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(path for path, _ in adapter_layers(model))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


# what PEFT writes is read here


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 3},
            "alpha_pattern": {"^model.layers.0.*v_proj": 5},
        },
        {"rank_pattern": {"k_proj": 9}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "patterns", "rslora-patterns"],
)
def test_an_adapter_that_peft_saved_gives_the_same_logits_here(
    pack: Pack, options: dict[str, object], tmp_path: Path
) -> None:
    dense, packed = pack("llama")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear",
                        init_lora_weights=False, **options)  # fmt: skip
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), config)
    theirs.save_pretrained(tmp_path)
    model = load_model(packed)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_peft_saved_on_gpt2_gives_the_same_logits_here(
    pack: Pack, tmp_path: Path
) -> None:
    dense, packed = pack("gpt2")
    config = LoraConfig(
        r=3, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), config)
    theirs.save_pretrained(tmp_path)
    model = load_model(packed)
    assert load_adapter(model, tmp_path) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
    ]
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"bias": "lora_only"}, "expected bias 'none', got 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4'"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, got None"),
        ({"alpha_pattern": {"(": 3}}, "malformed alpha_pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_than_lora_is_refused_by_its_name(
    llama: nn.Module, pack: Pack, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path, base="base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=message):
        load_adapter(llama, tmp_path)
    assert not list(adapter_layers(llama))


def test_experts_stay_as_they_are_and_the_linear_layers_beside_them_are_adapted(
    pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense, packed = pack("qwen3_moe")
    model = trained(load_model(packed))
    assert "packed expert matrices stay as they are" in caplog.text
    assert {type(layer) for _, layer in adapter_layers(model)} == {LoRALinear}
    save_adapter(model, tmp_path, base=str(dense))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


# files that aren't adapters


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG_FILE).write_text("{"), "adapter_config.json: not readable JSON"),
        (lambda f: (f / CONFIG_FILE).write_text("[]"), "expected an object, got list"),
        (lambda f: (f / RECORD_FILE).write_text('{"format": 99}'), "reads formats 1 and 2 of modulora.json, got 99"),
        (lambda f: (f / RECORD_FILE).write_text('{"format": 1}'), "malformed modulora.json"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b"short"), "not a readable safetensors file"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), "expected adapter_model.safetensors in it"),
        (lambda f: (f / WEIGHTS_FILE).rename(f / "adapter_model.bin"), "is a pickle, which is not read"),
    ],
    ids=["json", "list", "format", "record", "weights", "missing", "pickle"],
)  # fmt: skip
def test_a_damaged_adapter_is_refused_with_the_file(
    llama: nn.Module, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    save_adapter(trained(llama), tmp_path, base="base")
    damage(tmp_path)
    with pytest.raises(AdapterError, match=message):
        adapter_deltas(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it holds no tensors"),
        ({"base_model.model.x.lora_A.weight": (2, 4)}, r"x: expected .* got \[2, 4\] and none"),
        ({"base_model.model.x.lora_A.weight": (2, 4), "base_model.model.x.lora_B.weight": (4, 3)},
         r"got \[2, 4\] and \[4, 3\]"),
        ({"base_model.model.x.lora_magnitude_vector": (4,)}, "got base_model.model.x.lora_magnitude_vector"),
        ({"x.lora_A.weight": (2, 4)}, "got x.lora_A.weight"),
    ],
    ids=["none", "half", "ranks", "dora", "prefix"],
)  # fmt: skip
def test_tensors_that_are_no_adapters_are_refused(
    llama: nn.Module, tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    save_adapter(trained(llama), tmp_path, base="base")
    save_file(
        {name: torch.zeros(shape) for name, shape in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match=message):
        adapter_deltas(tmp_path)


def test_a_path_that_isnt_there_is_refused_without_asking_the_hub() -> None:
    with pytest.raises(AdapterError, match="no such folder, and it doesn't look like a Hub id"):
        adapter_deltas("./no/such/adapter")
