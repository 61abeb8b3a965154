"""Adapters on fused experts: PEFT on the dense model gives the same logits and gradients."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from modulora_core.errors import AdapterError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.lora.targets import select_layers
from modulora_core.packed_parameters import PackedStack
from modulora_core.tests.adapted_models import IDS, logits, trained
from modulora_core.tests.expert_gradients import worst_gradient
from modulora_core.tests.tiny_models import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")

# in gpt_oss and llama4_text the model sees [experts, in, out]; deepseek_v3 has shared experts
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"]
FAMILIES = [name for name in FAMILIES if name in ARCHITECTURES]
UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def assert_same(first, second):
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-4, atol=1e-5)


def in_peft(dense, adapter, **options):
    base = AutoModelForCausalLM.from_pretrained(dense, experts_implementation="eager")
    return PeftModel.from_pretrained(base, adapter, **options)


@pytest.fixture(scope="module")
def both(pack, tmp_path_factory):
    """The folders of a packed model and of a dense one with the same weights."""
    made = {}

    def folders(architecture):
        if architecture not in made:
            packed = pack(architecture, "toy")[1]
            dense = tmp_path_factory.mktemp("dense") / architecture
            merge(str(packed), dense, dtype="float32")
            made[architecture] = packed, dense
        return made[architecture]

    return folders


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_layer_and_expert_is_adapted_and_peft_gives_the_same_logits(
    both, architecture, tmp_path
):
    packed, dense = both(architecture)
    model = trained(load_model(packed), LoRASettings(rank=3))
    adapted = {path.partition("layers.1.")[2] for path, _ in adapter_layers(model)}
    assert {path.rpartition(".")[2] for path in adapted if "experts." in path} >= {
        "gate_up_proj", "down_proj",
    }  # fmt: skip
    assert not any(word in path for path in adapted for word in ("router", "mlp.gate."))
    save_adapter(model, tmp_path / "adapter")
    assert_same(in_peft(dense, tmp_path / "adapter"), model)
    again = load_model(packed)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    merge(str(packed), tmp_path / "merged", adapter=str(tmp_path / "adapter"), dtype="float32")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), model)
    assert (logits(model) - logits(load_model(packed))).abs().max() > 0.05


# PEFT applies patterns to parameters too, and says that it did not
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("targets", [[UP, DOWN], [DOWN]], ids=["both", "down"])
def test_an_adapter_from_peft_gives_the_same_logits(both, architecture, targets, tmp_path):
    packed, dense = both(architecture)
    options = {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.0.*down_proj": 7}}
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(dense),
        LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj"], target_parameters=targets,
                   init_lora_weights=False, use_rslora=True, **options),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(packed)
    load_adapter(model, tmp_path / "theirs")
    assert_same(model, theirs)
    save_adapter(model, tmp_path / "ours")
    assert_same(in_peft(dense, tmp_path / "ours"), theirs)


@pytest.mark.parametrize("architecture", [name for name in FAMILIES if name != "llama4_text"])
def test_gradients_are_those_of_the_dense_model(pack, architecture, tmp_path):
    assert worst_gradient(pack(architecture, "toy")[1], tmp_path) < 1e-12


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"}),
        ("experts", {"gate_up_proj", "down_proj"}),
        (("experts", "q_b_proj"), {"gate_up_proj", "down_proj", "q_b_proj"}),
        ("gate_up_proj", {"gate_up_proj"}),
        ("mlp.experts.down_proj", {"down_proj"}),
    ],
)
def test_targets_choose_attention_experts_or_both(pack, targets, expected):
    model = load_model(pack("deepseek_v3")[1])
    paths = add_lora(model, LoRASettings(targets=targets))
    assert {path.rpartition(".")[2] for path in paths} == expected
    assert not any("shared" in path or "layers.0.mlp" in path for path in paths)
    kinds = {isinstance(model.get_submodule(path), PackedStack) for path in paths}
    assert kinds == ({False} if targets == "attention" else {True, *(["q_b_proj" not in expected])})


def test_a_group_has_no_router_and_a_name_selects_it():
    """As in HunYuan and JetMoE, whose routers are linear layers."""
    linear = ["mlp.gate.wg", "self_attn.experts.router.layer", "self_attn.q_proj", "mlp.gate_proj"]
    shapes = dict.fromkeys(linear, (8, 8))
    shapes["mlp.experts.up_proj"] = (4, 8, 8)
    assert select_layers(shapes, "all-linear", 1, []) == [*linear[2:], "mlp.experts.up_proj"]
    assert select_layers(shapes, "attention", 1, []) == ["self_attn.q_proj"]
    assert select_layers(shapes, "wg", 1, []) == ["mlp.gate.wg"]


def test_dropout_of_experts_trains_here_and_is_no_obstacle_to_peft(both, tmp_path):
    packed, dense = both("qwen3_moe")
    model = trained(load_model(packed), LoRASettings(rank=3, dropout=0.3, targets="experts"))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    assert_same(in_peft(dense, tmp_path), model)
    again = load_model(packed)
    load_adapter(again, tmp_path, trainable=True)
    assert {layer.dropout["default"].p for _, layer in adapter_layers(again)} == {0.3}
    with torch.no_grad():
        assert not torch.equal(again.train()(IDS).logits, again.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, _: config.update(target_parameters=["experts.up"]), "is not packed"),
        (
            lambda _, tensors: [tensors.pop(key) for key in list(tensors) if "base_layer" in key],
            "expected .*experts.base_layer, the adapter of .*gate_up_proj, found none",
        ),
        (
            lambda _, tensors: [
                tensors.update({key: value[:7] if "A" in key else value[:, :7]})
                for key, value in tensors.items() if "experts.lora" in key
            ],
            "down_proj: expected lora_A with a multiple of 4 rows",
        ),
    ],
    ids=["no such parameter", "half of it", "rows"],
)  # fmt: skip
def test_an_adapter_of_other_experts_is_refused(pack, change, message, tmp_path):
    from safetensors.torch import load_file, save_file

    packed = pack("mixtral")[1]
    save_adapter(trained(load_model(packed), LoRASettings(targets="experts")), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_model(packed), tmp_path)
