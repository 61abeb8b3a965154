"""Rotary embeddings of GGUF files: llama.cpp's metadata, most of which transformers leaves out."""

from types import SimpleNamespace

import pytest
import torch
from modulora_gguf.file.config import gguf_config, set_rope
from modulora_gguf.file.model_header import read_header
from modulora_gguf.tests.tiny_gguf import ARCHITECTURES, write_tiny_gguf
from transformers import LlamaConfig, Phi3Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modulora_core.errors import ModelError


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """``config_of(fields, factors)`` is of a tiny Llama with more metadata and tensors."""
    old, top, layer = ARCHITECTURES["llama"]

    def make(fields, factors):
        shapes = {name: (len(values),) for name, values in factors.items()}
        monkeypatch.setitem(ARCHITECTURES, "llama", ({**old, **fields}, {**top, **shapes}, layer))
        path = write_tiny_gguf("llama", tmp_path / "tiny.gguf", "Q8_0")
        data = bytearray(path.read_bytes())
        for info in read_header(path).tensors:
            if info.name in factors:
                values = torch.tensor(factors[info.name]).numpy().tobytes()
                data[info.offset : info.offset + len(values)] = values
        path.write_bytes(bytes(data))
        return gguf_config(read_header(path))[0]

    return make


def frequencies(config):
    found, attention_factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    assert attention_factor == 1
    return found


def test_factors_of_llama_3_are_its_rotary_embedding(config_of):
    llama3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
    expected = frequencies(LlamaConfig(head_dim=8, rope_parameters=llama3))
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    factors = (plain / expected).tolist()  # as llama.cpp's converter writes them
    assert max(factors) == 8
    found = frequencies(config_of({}, {"rope_freqs.weight": factors}))
    torch.testing.assert_close(found, expected)


def test_scaling_and_base_are_the_files(config_of):
    fields = {"rope.freq_base": 5e5, "rope.scaling.factor": 4.0}
    rope = config_of(fields, {}).rope_parameters
    assert rope == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def test_a_wrong_field_is_refused(config_of):
    with pytest.raises(ModelError, match=r"rope.freq_base: expected a positive number, got 0.0"):
        config_of({"rope.freq_base": 0.0}, {})


def test_a_part_of_a_head_is_rotated_if_the_architecture_can():
    field = {"x.rope.dimension_count": SimpleNamespace(value=4)}
    header = SimpleNamespace(architecture="x", fields=field, tensors=())
    config = Phi3Config(hidden_size=32, num_attention_heads=4)
    set_rope(config, header)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    with pytest.raises(ModelError, match=r"rope.dimension_count: expected a head's 8, got 4"):
        set_rope(Qwen3Config(head_dim=8), header)
