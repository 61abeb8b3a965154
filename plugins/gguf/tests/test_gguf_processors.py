"""Architectures whose GGUF tensors we order ourselves, beside the models that they were made of."""

import gguf
import pytest
import torch
from modulora_gguf.file.config import gguf_config
from modulora_gguf.file.model_header import read_header
from transformers import AutoModelForCausalLM, FalconConfig, GptOssConfig

from modulora_core.errors import ModelError
from modulora_core.models.source import open_dense

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
FALCON = FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True, bias=False)
GPT_OSS = GptOssConfig(
    **SIZES, head_dim=8, num_key_value_heads=2, num_local_experts=2, intermediate_size=48,
    num_experts_per_tok=1, sliding_window=16, max_position_embeddings=256,
    rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                     "truncate": False, "rope_theta": 15000.0, "beta_fast": 16.0},
)  # fmt: skip


def converted(name, value):
    """The tensors of a GGUF file that llama.cpp's converter makes of a parameter."""
    if "experts." in name:
        value, kind = (value, "bias") if "bias" in name else (value.transpose(1, 2), "weight")
        if "gate_up" in name:
            yield f"blk.0.ffn_gate_exps.{kind}", value[:, 0::2]
            yield f"blk.0.ffn_up_exps.{kind}", value[:, 1::2]
        else:
            yield f"blk.0.ffn_down_exps.{kind}", value
        return
    if "query_key_value" in name:  # two groups of two queries, a key and a value, of 8 rows each
        q1, q2, k, v = value.view(2, 4, 8, 32).unbind(1)
        value = torch.cat([torch.stack([q1, q2], 1).flatten(0, 2), *k, *v])
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.GPT_OSS if "model." in name else gguf.MODEL_ARCH.FALCON, 1
    )
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is not None:  # the tied head has no tensor
        yield found + (".weight" if name.endswith("sinks") else ""), value


def write(path, model, config, groups=2):
    architecture = "falcon" if config.model_type == "falcon" else "gpt-oss"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(groups)
    writer.add_vocab_size(64)
    if architecture == "gpt-oss":
        writer.add_context_length(256)
        writer.add_feed_forward_length(48)
        writer.add_key_length(8)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
        writer.add_sliding_window(16)
        writer.add_rope_freq_base(15000.0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_yarn_beta_fast(16.0)
    for name, value in model.state_dict().items():
        for stored, part in converted(name, value):
            writer.add_tensor(stored, part.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("config", [FALCON, GPT_OSS], ids=["falcon", "gpt-oss"])
def test_values_and_logits_are_the_models(config, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write(tmp_path / "tiny.gguf", model, config)
    source = open_dense(str(tmp_path / "tiny.gguf"))
    source.check_whole()
    assert not source.unplaced
    found = dict(source.tensors())
    assert found.keys() | {"lm_head.weight"} == model.state_dict().keys() | {"lm_head.weight"}
    for name, value in found.items():
        assert torch.equal(value, model.state_dict()[name]), name
    loaded = AutoModelForCausalLM.from_config(source.config).eval()
    loaded.load_state_dict(model.state_dict())
    ids = torch.arange(1, 61)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def config_of(path):
    return gguf_config(read_header(path))[0]


def test_groups_of_falcon_must_divide_the_heads(tmp_path):
    write(tmp_path / "tiny.gguf", AutoModelForCausalLM.from_config(FALCON), FALCON, groups=3)
    with pytest.raises(ModelError, match=r"head_count_kv: expected a divisor of 4 heads, got 3"):
        config_of(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gemma4", r"it leaves out sizes of the layers\); it reads bloom"),
        ("mamba", "it takes Falcon Mamba for Mamba"),
    ],
)
def test_what_transformers_would_load_wrongly_is_refused(architecture, message, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", architecture)
    writer.add_ssm_dt_b_c_rms(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=message):
        config_of(tmp_path / "tiny.gguf")
