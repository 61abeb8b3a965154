"""Adapters are exchanged with `peft` itself, which runs them on the dense models.

The quantizer ``verbatim`` keeps every weight, so the two models differ in the adapter's code alone.
"""

import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from modulora_core.errors import AdapterError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.peft_format import read_adapter
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.layers import QuantLinear
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.settings import LoRASettings
from modulora_core.tests.adapted_models import logits, trained

pytestmark = pytest.mark.usefixtures("one_thread")


def in_peft(dense, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), adapter)


def assert_same(first, second):
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "llama-biased", "gpt2", "phi3", "gemma"])
@pytest.mark.parametrize("every", [True, False], ids=["all layers", "three layers"])
def test_peft_gives_the_same_logits(pack, architecture, every, tmp_path):
    dense, packed = pack(architecture)
    model = load_model(packed)
    paths = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
    targets = ("all-linear",) if every else tuple(paths[1:4])
    trained(model, LoRASettings(rank=4, targets=targets))
    save_adapter(model, tmp_path, base=str(dense))
    theirs = in_peft(dense, tmp_path)
    lora = peft.tuners.lora.Linear
    adapted = {name for name, module in theirs.named_modules() if isinstance(module, lora)}
    assert adapted == {f"base_model.model.{path}" for path in (paths if every else paths[1:4])}
    assert_same(theirs, model)
    base = AutoModelForCausalLM.from_pretrained(dense)
    assert (logits(model) - logits(base)).abs().max() > 0.05


def test_peft_warns_of_channel_scales_and_ignores_them(pack, tmp_path):
    dense, packed = pack("llama")
    model = trained(load_model(packed), LoRASettings(rank=3, train_scales=True))
    save_adapter(model, tmp_path, base=str(dense))
    with pytest.warns(UserWarning, match="modulora_channel_scales"):
        theirs = in_peft(dense, tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() > 0.05
    for _, layer in adapter_layers(model):
        layer.input_scale.clear()
        layer.output_scale.clear()
    assert_same(theirs, model)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"use_rslora": True}),
        (
            "llama",
            {
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 3},
                "alpha_pattern": {"^model.layers.0.*v_proj": 5},
            },
        ),
        ("llama", {"rank_pattern": {"k_proj": 9}, "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    ids=["rslora", "patterns", "rslora and patterns", "gpt2"],
)
def test_an_adapter_from_peft_gives_the_same_logits_here(pack, architecture, options, tmp_path):
    dense, packed = pack(architecture)
    common = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "init_lora_weights": False}
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(dense), LoraConfig(**{**common, **options})
    )
    theirs.save_pretrained(tmp_path)
    model = load_model(packed)
    load_adapter(model, tmp_path)
    assert_same(model, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "got peft_type = 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, r"got modules_to_save = \['lm_head'\]"),
        ({"bias": "lora_only"}, "got bias = 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "= 'pissa_niter_4'; convert it with peft's"),
        ({"lora_alpha": None}, "got lora_alpha = None"),
        ({"alpha_pattern": {"(": 3}}, "malformed alpha_pattern"),
        ({"r": 3}, "_proj: expected rank 3 by r and rank_pattern, got 4"),
        ({"rank_pattern": {"up_proj": 3}}, "up_proj: expected rank 3 by r"),
    ],
)
def test_more_than_lora_is_refused_by_its_name(pack, changes, message, tmp_path):
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path, stacks={})
