"""Fixtures of the commands' tests: a small model, packed, and text to train on."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulora_core.cli import main
from modulora_core.tests.tiny_models import tiny_config
from modulora_core.tests.tiny_tokenizer import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(capsys, toy):
    """``run("info", path)`` gives the exit code, the JSON object of stdout, and stderr."""

    def run(*words):
        capsys.readouterr()
        code = main([*map(str, words), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return run


@pytest.fixture
def text_of(capsys, toy):
    """``text_of("info", path)`` gives the stdout of a command that succeeds, in one line."""

    def text_of(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return " ".join(capsys.readouterr().out.split())

    return text_of


def save_source(folder, architecture="llama"):
    """Save a tiny model with a tokenizer that has a chat template."""
    tokenizer = make_tokenizer(template=TEMPLATE)
    torch.manual_seed(0)
    config = tiny_config(architecture)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(scope="session")
def packed(source, toy):
    from modulora_core.quantization.quantize import quantize

    quantize(str(source), source.parent / "packed", "toy")
    return source.parent / "packed"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path
