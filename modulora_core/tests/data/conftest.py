"""Tokenizers and a data file for the tests of this folder."""

import pytest

from modulora_core.tests.tiny_tokenizer import make_tokenizer, smol_tokenizer, write_jsonl


@pytest.fixture(scope="session")
def smol():
    return smol_tokenizer()


@pytest.fixture(scope="session")
def plain():
    return make_tokenizer()


@pytest.fixture
def save(tmp_path):
    return lambda *rows: write_jsonl(tmp_path / "data.jsonl", *rows)
