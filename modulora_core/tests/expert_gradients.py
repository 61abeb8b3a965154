"""Compare the gradients of an adapter on a packed mixture of experts with PEFT's on a dense one."""

from peft import PeftModel
from transformers import AutoModelForCausalLM

from modulora_core.hf.expert_format import stacks_of, to_file
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.tests.adapted_models import IDS, randomize


def worst_gradient(packed, work):
    """The largest relative error of a gradient of A or B, in float64. ``work``: a folder to use."""
    model = load_model(packed, dtype="float32", device="cpu")
    add_lora(model, LoRASettings(rank=3, dropout=0))
    randomize(model)
    save_adapter(model, work / "adapter")
    merge(str(packed), work / "dense", dtype="float32")
    # transformers' batched products have no float64
    dense = AutoModelForCausalLM.from_pretrained(work / "dense", experts_implementation="eager")
    theirs = PeftModel.from_pretrained(dense, work / "adapter", is_trainable=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, theirs):
        each.double().train()
        each.config.use_cache = False
        each(input_ids=IDS, labels=IDS).loss.backward()
    layers = {path: layer.parameters_of("default") for path, layer in adapter_layers(model)}
    ours = {path: (p["lora_A"].grad, p["lora_B"].grad) for path, p in layers.items()}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    laid = {
        f"base_model.model.{path}.lora_{kind}.default.weight": gradient
        for path, pair in to_file(ours, stacks_of(model)).items()
        for kind, gradient in zip("AB", pair, strict=True)
    }
    assert laid.keys() == expected.keys()
    assert any("experts" in name for name in laid)
    return max(float((laid[n] - expected[n]).norm() / expected[n].norm()) for n in laid)
