"""Adapters are put on packed models; a wrong request changes nothing."""

import pytest
import torch

from modulora_core.errors import AdapterError, OptionError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.layers import QuantLinear
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import logits
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama(pack):
    """Hidden size 32; k_proj and v_proj are [16, 32], the MLP's matrices have 32 and 48."""
    return load_model(pack("llama")[1])


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "with scales"])
def test_every_packed_layer_trains_and_nothing_else(llama, scales):
    packed = [path for path, module in llama.named_modules() if isinstance(module, QuantLinear)]
    before = logits(llama)
    assert add_lora(llama, LoRASettings(train_scales=scales)) == packed
    assert len(packed) == 2 * 7
    kinds = ["lora_A", "lora_B", *(["input_scale", "output_scale"] if scales else [])]
    trains = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert trains == {f"{path}.{kind}.default" for path in packed for kind in kinds}
    assert torch.equal(logits(llama), before), "a new adapter changes no logit"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (
            ("self_attn.k_proj", "layers.1.self_attn.q_proj"),
            ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj",
             "model.layers.1.self_attn.k_proj"],
        ),
        (("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
    ],
)  # fmt: skip
def test_targets_match_whole_parts_at_the_end_of_a_path(llama, targets, expected):
    assert add_lora(llama, LoRASettings(targets=targets)) == expected


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"targets": ("v_proj", "q_porj")}, AdapterError, "'q_porj': .*did you mean 'q_proj'"),
        ({"targets": ("v_proj", "proj")}, AdapterError, "'proj': no packed layer has that name"),
        ({"targets": "lm_head"}, AdapterError, "expected a packed linear layer, and lm_head is"),
        ({"rank": 33}, OptionError, r"^rank 33: expected at most 32, .*, is \[32, 32\]\); lower"),
        ({"rank": 17, "targets": "k_proj"}, OptionError, r"rank 17: expected at most 16"),
    ],
)
def test_a_wrong_request_changes_nothing(llama, settings, error, message):
    with pytest.raises(error, match=message):
        add_lora(llama, LoRASettings(**settings))
    assert not list(adapter_layers(llama))


@pytest.fixture
def packed_head(toy, tmp_path):
    """A model whose output head alone is packed."""
    dense = save_tiny_model("llama", tmp_path / "dense")
    quantize(str(dense), tmp_path / "packed", "toy", exclude=["model.*"], head=Choice("toy"))
    return tmp_path / "packed"


def test_a_tied_head_is_refused_as_the_embeddings_table(packed_head, tmp_path):
    other = load_model(packed_head)
    add_lora(other, LoRASettings(targets="lm_head"))
    save_adapter(other, tmp_path / "adapter")
    dense = save_tiny_model("llama-tied", tmp_path / "tied")
    quantize(str(dense), tmp_path / "packed-tied", "toy", embeddings=Choice("toy"))
    model = load_model(tmp_path / "packed-tied")
    with pytest.raises(AdapterError, match="and lm_head is the embedding's table, which an adap"):
        add_lora(model, LoRASettings(targets="lm_head"))
    with pytest.raises(AdapterError, match=r"does not fit .*: lm_head is the embedding's table"):
        load_adapter(model, tmp_path / "adapter")


def test_a_group_never_has_the_head(packed_head):
    with pytest.raises(AdapterError, match="besides the output head in the model, found none"):
        add_lora(load_model(packed_head))
    assert add_lora(load_model(packed_head), LoRASettings(targets="lm_head")) == ["lm_head"]
