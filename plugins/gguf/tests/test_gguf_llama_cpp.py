"""llama.cpp itself beside ours, where llama-cpp-python is installed: quantizing, merging, LoRA."""

import dataclasses

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from modulora_gguf import FORMATS
from modulora_gguf.file.lora_file import write_lora_file
from modulora_gguf.file.merging import LlamaCppWriter
from modulora_gguf.file.model_header import read_header
from modulora_gguf.file.splits import _LIKE_GPT2, _SPLITS, LIKE_LLAMA_3
from modulora_gguf.file.tokenizer import load_tokenizer
from modulora_gguf.tests.adapted import adapted
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from modulora_gguf.tests.vocabularies import IMITATIONS, TEXTS, chat, odd_texts, write_vocabulary

from modulora_core.hf.load_model import load_model
from modulora_core.models.stops import stop_ids
from modulora_core.quantization.quantize import quantize

write_merged = LlamaCppWriter(FORMATS[0]).merge

llama_cpp = pytest.importorskip("llama_cpp")


def by_llama_cpp(path, ids, lora=None):
    """Logits of every token: ``[tokens, vocabulary]``. Keys and values are F32, not F16."""
    found = llama_cpp.Llama(
        str(path), lora_path=None if lora is None else str(lora), n_ctx=64, logits_all=True,
        verbose=False, type_k=GGMLQuantizationType.F32, type_v=GGMLQuantizationType.F32,
    )  # fmt: skip
    found.eval(ids)
    return torch.from_numpy(np.array(found.scores[: len(ids)]))


def by_ours(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "mixtral"])
def test_merged_files_and_lora_files_have_our_logits(architecture, tmp_path):
    """In F32, experts included: llama.cpp rounds activations to 8 bits for other types."""
    source = str(write_tiny_gguf(architecture, tmp_path / "source.gguf"))
    packed, adapter = tmp_path / "packed", str(tmp_path / "adapter")
    quantize(source, packed, "gguf", {"type": "Q8_0"})
    ids = list(range(5, 45))
    before = by_ours(load_model(packed), ids)
    after = by_ours(adapted(packed, tmp_path / "adapter", std=0.1), ids)
    base, merged, blocks = (tmp_path / f"{name}.gguf" for name in ("base", "merged", "blocks"))
    write_merged(str(packed), base, type="F32", base=source)
    write_merged(str(packed), blocks, type="Q8_0", base=source)
    write_merged(str(packed), merged, type="F32", adapter=adapter, base=source)
    write_lora_file(adapter, tmp_path / "lora.gguf", model=str(blocks))
    for found, expected in (
        (by_llama_cpp(base, ids), before),
        (by_llama_cpp(merged, ids), after),
        (by_llama_cpp(base, ids, tmp_path / "lora.gguf"), after),
    ):
        assert (found - expected).norm() < 0.005 * (after - before).norm()


NAMES = (*_SPLITS, *_LIKE_GPT2, *LIKE_LLAMA_3, "qwen2", "gpt-4o", "smaug-bpe", "qwen35")


@pytest.mark.parametrize("name", NAMES)
def test_text_is_split_as_llama_cpp_splits_it(name, tmp_path):
    like = dataclasses.replace(IMITATIONS["llama-3"], pre=name)
    assert_ids_are_llama_cpps(write_vocabulary(tmp_path / "v.gguf", like), TEXTS)


@pytest.mark.parametrize("name", IMITATIONS)
def test_ids_and_ends_are_llama_cpps(name, tmp_path):
    like = IMITATIONS[name]
    path = write_vocabulary(tmp_path / "v.gguf", like)
    texts = [*(chat(like, turns) for turns in range(1, 6)), *odd_texts(like, 200)]
    # llama.cpp takes the ideographic space for a letter in some places; the models' authors don't
    ours, theirs = assert_ids_are_llama_cpps(path, [t for t in texts if "\u3000" not in t])
    vocabulary = theirs._model.vocab
    ends = [i for i in range(len(ours)) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert stop_ids(ours) == ends


def assert_ids_are_llama_cpps(path, texts):
    """Compare ids with BOS and without. Returns both tokenizers."""
    ours = load_tokenizer(read_header(path))
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in texts:
        for special in (False, True):
            expected = theirs.tokenize(text.encode(), add_bos=special, special=True)
            assert ours(text, add_special_tokens=special).input_ids == expected, text
    return ours, theirs
