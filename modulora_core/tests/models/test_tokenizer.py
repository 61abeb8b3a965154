"""A tokenizer that panics in Rust is refused in one sentence."""

import base64
import json

import pytest

from modulora_core.data.rendering import token_ids
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import ModelError
from modulora_core.models.tokenizer import load_tokenizer
from modulora_core.tests.tiny_tokenizer import make_tokenizer

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEMPLATE = [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]


def charsmap(data):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def saved(folder, **parts):
    """A folder with a small tokenizer of which some parts are others."""
    make_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return folder


REFUSED_AT_ENCODING = {
    "a charsmap without its trie": {"normalizer": charsmap(b"\4\0\0\0abcdxx")},
    "backtracking": {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}},
    "an unknown token": {"post_processor": {
        "type": "TemplateProcessing", "single": TEMPLATE, "pair": TEMPLATE, "special_tokens": {}}},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}  # fmt: skip


@pytest.mark.parametrize("parts", REFUSED_AT_ENCODING.values(), ids=REFUSED_AT_ENCODING)
def test_it_is_refused_when_it_encodes(parts, tmp_path):
    with pytest.raises(ModelError, match=r"tokeniz\w+.*take another tokenizer|no tokenizer that"):
        token_ids(
            load_tokenizer("it", saved(tmp_path, **parts)), ["a" * 40 + "b"],
            add_special_tokens=True,
        )  # fmt: skip


def sentencepiece_folder(folder):
    """A folder with the SentencePiece model of T5's tokenizer, and no tokenizer.json."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    pytest.importorskip("google.protobuf")
    (folder / "text.txt").write_text(pydoc_text()[:40_000])
    trainer.train(input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"),
                  vocab_size=300, minloglevel=2)  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return folder


@pytest.mark.slow
def test_a_sound_sentencepiece_model_is_read(tmp_path):
    tokenizer = load_tokenizer("it", sentencepiece_folder(tmp_path))
    assert tokenizer.decode(token_ids(tokenizer, ["the name"])[0]) == "the name"
