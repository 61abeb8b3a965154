"""Tokenizers of GGUF files: the file's tokens and no others, split and joined as llama.cpp does."""

import json
from pathlib import Path

import gguf
import pytest
from modulora_gguf.file.model_header import read_header
from modulora_gguf.file.splits import pre_tokenizer
from modulora_gguf.file.tokenizer import load_tokenizer
from modulora_gguf.tests.vocabularies import (
    CONTROL,
    IMITATIONS,
    USER_DEFINED,
    Imitation,
    chat,
    odd_texts,
    template_of,
    vocabulary_of,
    write_vocabulary,
)
from transformers import AutoTokenizer, PretrainedConfig

from modulora_core.data.formats import IGNORED, Conversation
from modulora_core.data.rendering import Renderer
from modulora_core.errors import ModelError
from modulora_core.models.stops import stop_ids
from modulora_core.models.tokenizer import load_tokenizer as load_from_folder
from modulora_core.models.tokenizer import write_tokenizer


@pytest.fixture(scope="module", params=IMITATIONS)
def imitated(request, tmp_path_factory):
    """A vocabulary like a model's, and our tokenizer of it."""
    like = IMITATIONS[request.param]
    path = write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf", like)
    return like, load_tokenizer(read_header(path))


def test_each_token_has_its_id_and_none_is_added(imitated):
    like, tokenizer = imitated
    tokens, types, _ = vocabulary_of(like)
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert len(tokenizer) == len(tokenizer.get_vocab()) == len(tokens)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, USER_DEFINED):
            text = f"x{token}x"
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids.count(i) == 1
            assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
            shown = tokenizer.decode(ids, skip_special_tokens=True)
            assert (token in shown) == (kind == USER_DEFINED)


def test_odd_texts_come_back(imitated):
    like, tokenizer = imitated
    for text in odd_texts(like, 200):
        ids = tokenizer(text).input_ids
        assert max(ids, default=0) < len(tokenizer)
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        if like.model == "gpt2":
            assert back == text
        else:  # a space before each piece, and ▁ for a space
            assert "".join(back.split()) == "".join(text.replace("▁", " ").split())


def test_a_written_tokenizer_has_the_same_ids(imitated, tmp_path):
    """AutoTokenizer has a class for Qwen2's models, which normalizes text."""
    like, tokenizer = imitated
    config = PretrainedConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    write_tokenizer(tokenizer, config, tmp_path)
    kind = like.architecture.replace("-", "_")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    again = load_from_folder("folder", tmp_path)
    texts = [chat(like, 3), *odd_texts(like, 30)]
    assert again(texts).input_ids == tokenizer(texts).input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(tokenizer)
    if kind != "qwen2":
        assert theirs(texts).input_ids == tokenizer(texts).input_ids


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama-3", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
        ("qwen2", ["<|endoftext|>", "<|im_end|>", "<|file_sep|>"]),
        ("r1-distill-qwen", ["<｜end▁of▁sentence｜>"]),
        ("gpt-oss", ["<|endoftext|>", "<|return|>", "<|call|>"]),
        ("phi-3", ["</s>", "<|endoftext|>", "<|end|>"]),
        ("gemma", ["</s>", "<end_of_turn>"]),
    ],
)
def test_answers_end_at_every_end_token(name, ends, tmp_path):
    path = write_vocabulary(tmp_path / "v.gguf", IMITATIONS[name])
    tokenizer = load_tokenizer(read_header(path))
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == ends


def test_chats_are_trained_with_the_ids_of_their_text(imitated):
    """Generation reads the same prompt, and the answer's tokens follow it."""
    like, tokenizer = imitated
    tokenizer.chat_template = template_of(like)
    asked = ({"role": "user", "content": "Hello  you"},)
    said = (*asked, {"role": "assistant", "content": "Good day\nto you"})
    renderer = Renderer(tokenizer)
    (rendering,) = renderer.render(Conversation(said, None, "1"))
    ((ids, labels),) = renderer.encode([rendering])
    text = (like.user + like.answer).format("Hello  you", "Good day\nto you")
    special = (*like.control, *like.plain)
    end = text.rstrip() if text.rstrip().endswith(special) else text
    assert ids == tokenizer(end, add_special_tokens=False).input_ids
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids
    trained = [one for one in labels if one != IGNORED]
    assert ids == [*prompt, *trained]


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("smollm", "I'VE 12345!", ["I", "'", "VE", "Ġ", "1", "2", "3", "4", "5", "!"]),
        ("stablelm2", "I'VE 12345!", ["I", "'VE", "Ġ", "1", "2", "3", "4", "5", "!"]),
        ("falcon", "a $12345!", ["a", "Ġ", "$", "123", "45", "!"]),
        ("default", "a $12345!", ["a", "Ġ", "$", "123", "45", "!"]),
        ("deepseek-llm", "I a,本 12\n", ["I", "Ġa", ",", "æľ¬", "Ġ", "12", "Ċ"]),
        ("deepseek-v3", "12345.a  b\n", ["123", "45", ".a", "Ġ", "Ġb", "Ċ"]),
        ("bloom", "a1b2 c, d", ["a1b2", "Ġc", ",", "Ġd"]),
    ],
)
def test_text_is_split_as_the_name_says(name, text, pieces):
    found = pre_tokenizer(Path("a.gguf"), name).pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


def test_llama_3_has_whole_words_and_a_first_token(tmp_path):
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(["a", "b", "c", "abc", "<s>"])  # no merge makes abc
    writer.add_token_merges([])
    writer.add_bos_token_id(4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert load_tokenizer(read_header(path))("abc").input_ids == [4, 3]


@pytest.mark.parametrize("model", ["t5", "bert", "rwkv"])
def test_another_kind_of_vocabulary_is_refused(model, tmp_path):
    path = write_vocabulary(tmp_path / "v.gguf", Imitation(model, "", (), (), None, None, "", ""))
    with pytest.raises(ModelError, match=f"tokenizer.ggml.model: expected gpt2 .*, got '{model}'"):
        load_tokenizer(read_header(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ["a", "a"]}, "expected each token once, got 'a' twice"),
        ({"tokens": []}, "expected a vocabulary, got none"),
        ({"tokens": "a"}, "expected an array"),
        ({"tokens": ["a", "b"], "types": [1]}, "token_type: expected one for each of 2 tokens"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change, message, tmp_path):
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if isinstance(change["tokens"], str):
        writer.add_string("tokenizer.ggml.tokens", change["tokens"])
    elif change["tokens"]:
        writer.add_token_list(change["tokens"])
    if "types" in change:
        writer.add_token_types(change["types"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=message):
        load_tokenizer(read_header(path))
