"""A SentencePiece model without tokenizer.json is a tokenizer."""

import pytest

from modulora_core.data.rendering import token_ids
from modulora_core.data.sources import pydoc_text
from modulora_core.models.tokenizer import load_tokenizer


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
