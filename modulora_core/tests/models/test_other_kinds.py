"""A model that isn't a causal language model alone is refused by name, and packed in Python."""

import pytest
import transformers
from transformers import AutoConfig

from modulora_core import ModuLoRAConfig, quantize
from modulora_core.errors import RequestError
from modulora_core.packed_parameters import PackedParameter

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4}  # fmt: skip
TEXT = {**SMALL, "vocab_size": 96, "num_key_value_heads": 2, "model_type": "llama"}
VISION = {**SMALL, "image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
SIZES = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
         "decoder_start_token_id": 2, "max_position_embeddings": 64}  # fmt: skip
WHISPER = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
MODELS = {
    "WhisperForConditionalGeneration": ("whisper", {**SIZES, **WHISPER}),
    "BartForConditionalGeneration": ("bart", SIZES),
    "MarianMTModel": ("marian", SIZES),
    "T5ForConditionalGeneration": ("t5", T5),
    "BertModel": ("bert", {**SMALL, "vocab_size": 96}),
    "ViTModel": ("vit", {**SMALL, "image_size": 28, "patch_size": 14}),
    "LlavaForConditionalGeneration": (
        "llava", {"vision_config": VISION, "text_config": TEXT, "image_token_index": 90},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_is_refused_by_name_and_packed_in_python(toy, tmp_path, name):
    model_type, options = MODELS[name]
    kind = getattr(transformers, name)
    dense = kind(AutoConfig.for_model(model_type, **options))
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(RequestError, match=r"packed in Python.*ModuLoRAConfig") as refused:
        quantize(str(tmp_path / "dense"), tmp_path / "packed", "toy")
    assert not (tmp_path / "packed").exists()
    if model_type in {"whisper", "bart", "marian", "bert"}:
        assert any(part in str(refused.value) for part in ("encoder", "pooler", "final_logits"))
    packed = kind.from_pretrained(tmp_path / "dense", quantization_config=ModuLoRAConfig("toy"))
    assert sum(isinstance(module, PackedParameter) for module in packed.modules()) >= 6
    packed.save_pretrained(tmp_path / "packed")
    again = kind.from_pretrained(tmp_path / "packed")
    state = packed.state_dict()
    assert {*again.state_dict()} == {*state}
    assert all(values.equal(state[n]) for n, values in again.state_dict().items())
