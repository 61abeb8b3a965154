"""``modulora weigh`` adds up what a model's files hold, and is listed with its distribution."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from modulora_core.cli import main


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a small Llama in fp32."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def test_kinds_add_up_to_the_model(llama, capsys):
    assert main(["weigh", str(llama), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 4 * LlamaForCausalLM.from_pretrained(llama).num_parameters()
    kinds = {each.pop("kind"): each for each in found["kinds"]}
    assert kinds["up_proj"] == {"parameters": 2, "packed": 0, "bytes": 4 * 2 * 48 * 32}
    assert found["bytes"] == sum(each["bytes"] for each in kinds.values())


def test_the_heaviest_kind_comes_first(llama, capsys):
    assert main(["weigh", str(llama)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layers", "parameters", "packed", "size", "share"]
    assert lines[1].startswith(("lm_head", "embed_tokens", "up_proj", "gate_proj", "down_proj"))


def test_a_model_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["weigh", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_help_names_the_distribution(capsys):
    assert main(["--help"]) == 0
    assert "[modulora-weigh]" in capsys.readouterr().out
