"""Groups of targets adapt the text decoder of a multimodal model."""

import ast
import json

import pytest
from transformers import AutoModelForImageTextToText, CLIPConfig, CLIPModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modulora_core import FinetuneConfig, ModuLoRAConfig, finetune
from modulora_core.errors import OptionError
from modulora_core.layers import QuantLinear
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.config import vocabulary_of, window_of

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
        "out_hidden_size": 32, "fullatt_block_indexes": [0]}  # fmt: skip
TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
MODELS = {
    "llava": {"vision_config": {**VISION, "model_type": "clip_vision_model"},
              "text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 90},
    "gemma3": {"vision_config": VISION, "text_config": {**TEXT, "head_dim": 8},
               "mm_tokens_per_image": 4, "image_token_index": 90},
    "qwen2_5_vl": {"vision_config": QWEN, "text_config": {**TEXT, "rope_parameters": ROPE},
                   "image_token_id": 90},
    "mistral3": {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
                 "text_config": {**TEXT, "model_type": "mistral"}, "image_token_index": 90},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    config = CONFIG_MAPPING[request.param](**MODELS[request.param])
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    return path


def test_the_context_and_the_vocabulary_are_those_of_the_text_decoder(toy, folder, tmp_path):
    """config.json has them under ``text_config`` alone."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=ModuLoRAConfig("toy")
    )
    model.save_pretrained(tmp_path / "packed")
    values = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert not {"max_position_embeddings", "vocab_size"} & values.keys()
    window = values["text_config"]["max_position_embeddings"]
    assert (window_of(model.config), vocabulary_of(model.config)) == (window, 96)
    config = FinetuneConfig(
        model=str(tmp_path / "packed"), out=str(tmp_path / "out"), data="pydoc", seq_len=window + 1
    )
    with pytest.raises(OptionError, match=f"expected at most {window}, the context of"):
        finetune(config)


@pytest.mark.parametrize("targets", ["all-linear", "attention", "q_proj", "vision"])
def test_targets(toy, folder, targets, caplog):
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=ModuLoRAConfig("toy")
    )
    decoder = next(path for path, module in model.named_modules() if module is model.get_decoder())
    if targets == "vision":
        others = [path for path, module in model.named_modules()
                  if isinstance(module, QuantLinear) and not path.startswith(decoder)]  # fmt: skip
        assert others
        assert add_lora(model, LoRASettings(rank=4, targets=others)) == others
        return
    paths = add_lora(model, LoRASettings(rank=4, targets=targets))
    inside = [path for path in paths if path.startswith(f"{decoder}.")]
    assert inside
    if targets == "q_proj":  # PEFT's rule
        assert {path.rpartition(".")[2] for path in paths} == {"q_proj"}
    else:
        assert paths == inside
        assert len(paths) == {"all-linear": 7, "attention": 4}[targets]
    assert ("get no adapter" in caplog.text) == (targets != "q_proj")
    if targets == "all-linear":
        named = ast.literal_eval(caplog.messages[-1].rpartition("targets=")[2])
        packed = [p for p, m in model.named_modules() if isinstance(m, QuantLinear)]
        assert {*add_lora(model, LoRASettings(rank=4, targets=named), "all")} == {*packed}


def test_a_model_without_a_decoder_is_adapted_whole(toy, tmp_path, caplog):
    text = {**TEXT, "projection_dim": 16}
    del text["num_key_value_heads"]
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(tmp_path, quantization_config=ModuLoRAConfig("toy"))
    packed = [path for path, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert add_lora(model, LoRASettings(rank=4)) == packed
    assert {path.partition("_")[0] for path in packed} == {"text", "vision", "visual"}
    assert "get no adapter" not in caplog.text
