"""Answers end at every token that the model, its tokenizer or its vocabulary names as an end."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modulora_core.inference.generate import generate
from modulora_core.models.generation import Sampling
from modulora_core.models.stops import stop_ids
from modulora_core.tests.tiny_models import save_tiny_model


def tokenizer_with(*special, plain=(), eos=None):
    """Bytes, and added tokens whose ids begin at 0."""
    names = [*special, *plain, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(name, special=True) for name in special])
    core.add_tokens([AddedToken(name) for name in plain])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)


@pytest.mark.parametrize(
    ("special", "plain", "eos", "named", "expected"),
    [
        (("<|im_start|>", "<|im_end|>", "<|endoftext|>"), (), "<|endoftext|>", (), [1, 2]),
        (("<s>", "</s>", "[INST]"), (), "</s>", (), [1]),
        (("<bos>", "<eos>", "<end_of_turn>"), (), "<eos>", (), [1, 2]),
        (("<|eot_id|>", "<|eom_id|>"), (), None, (), [0, 1]),
        (("<|user|>", "<|end|>"), (), None, (), [1]),
        (("<|return|>", "<|call|>", "<|end|>"), (), "<|return|>", (), [0, 1]),  # gpt-oss's parts
        (("<a>",), ("<|im_end|>",), None, (), []),  # no control token
        (("<a>", "<b>"), (), "<a>", ([1, 5000], 1, None), [0, 1]),  # two configs; no such id
    ],
)
def test_ends_are_those_of_configs_and_of_known_control_tokens(
    special, plain, eos, named, expected
):
    assert stop_ids(tokenizer_with(*special, plain=plain, eos=eos), *named, size=100) == expected


@pytest.mark.parametrize("by", ["vocabulary", "generation_config"])
def test_generation_stops_at_ends_beside_the_eos(by, tmp_path):
    """A model that says token 0 for ever, whose EOS is another token."""
    save_tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    if by == "vocabulary":
        tokenizer = tokenizer_with("<|im_end|>", "<eos>", eos="<eos>")
    else:
        tokenizer = tokenizer_with(plain=("STOP", "<eos>"), eos="<eos>")
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    tokenizer.save_pretrained(tmp_path)
    pieces = []
    found = generate(str(tmp_path), "a", Sampling(max_new_tokens=5), on_text=pieces.append)
    assert (found.tokens, found.text, pieces) == (1, "", [])
