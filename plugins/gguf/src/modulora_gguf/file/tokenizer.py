"""Split text as the metadata of a GGUF file says, where transformers does it in another way.

The field ``tokenizer.ggml.pre`` names how a byte-level BPE splits text into words. GPT-2's splits
are what transformers takes for a name that it doesn't know. The patterns here are published in
models' tokenizer.json files and in llama.cpp. Each splits the pieces that the one before it left.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modulora_core.errors import ModelError
from modulora_gguf.file.header import Header

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = r"[一-龥\u0800-一가-\ud7ff]+"

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^ա-ևა-ჿ]]+",
        r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK, r"\p{N}+",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "falcon": (_PUNCTUATION.replace("|]", "|`]"), _GPT2, "[0-9][0-9][0-9]"),
    "seed-coder": (_QWEN2.replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+"),),
    "viking": (_BLOOM, r"\p{N}"),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), (_BLOOM,)),
    **dict.fromkeys(("grok-2", "hunyuan", "solar-open", "stablelm2"), (_QWEN2,)),
    **dict.fromkeys(
        ("codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm",
         "starcoder"),
        (r"\p{N}", _GPT2),
    ),
}  # fmt: skip

_LIKE_GPT2 = {"a.x-4.0", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "mellum",
              "modern-bert", "mpt", "olmo", "phi-2", "trillion"}  # fmt: skip

_LIKE_LLAMA_3 = {"falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3",
                 "midm-2.0", "pixtral", "tekken"}  # fmt: skip
"""Names with BOS before a text, unless the file says otherwise. A word of the vocabulary is one
token, whatever the merges say."""


def load_tokenizer(path: Path, header: Header, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """As AutoTokenizer does; it would read the whole vocabulary once more, for the config.

    Raises:
        ModelError: a Unigram vocabulary; transformers raises other errors.
    """
    from transformers import TOKENIZER_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

    kind: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    ordinary = isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerFast)
    if not ordinary or (path.parent / "tokenizer_config.json").exists():
        kind = AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, **tokenizer_options(header)
    )
    set_splits(tokenizer, path, header)
    return tokenizer


def tokenizer_options(header: Header) -> dict[str, Any]:
    """Options for transformers that llama.cpp derives from the name, where the file lacks them.

    Raises:
        ModelError: a Unigram vocabulary, to which transformers adds T5's tokens.
    """
    if header.text("tokenizer.ggml.model", "") == "t5":
        raise ModelError("tokenizer.ggml.model: expected another than t5, which only T5 has")
    if "tokenizer.ggml.add_bos_token" in header.fields:
        return {}
    return {"add_bos_token": True} if _pre(header) in _LIKE_LLAMA_3 else {}


def set_splits(tokenizer: Any, path: Path, header: Header) -> None:
    """Set how ``tokenizer`` splits text; one line warns of a name that is not known here."""
    kind = header.text("tokenizer.ggml.model", "")
    if kind == "gpt2":
        _set_byte_level(tokenizer.backend_tokenizer, path, _pre(header))
    elif kind == "llama" and not header.text("general.architecture").startswith("gemma"):
        prefix = header.fields.get("tokenizer.ggml.add_space_prefix")
        _set_sentencepiece(tokenizer.backend_tokenizer, prefix is None or bool(prefix.value))


def _pre(header: Header) -> str:
    return header.text("tokenizer.ggml.pre", "")


def _set_byte_level(backend: Any, path: Path, name: str) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if name in _LIKE_LLAMA_3:
        backend.model.ignore_merges = True
    if name in GGUF_PRE_TOKENIZER_SPLITS or name in _LIKE_GPT2:
        return
    if name not in _SPLITS:
        _warn_unknown(path, name)
    patterns = _SPLITS.get(name, _SPLITS["default"])
    steps = [pre_tokenizers.Split(Regex(one), "isolated") for one in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])


def _set_sentencepiece(backend: Any, prefix: bool) -> None:
    """Put a space before every text with ``prefix``; keep all of the text's own spaces."""
    from tokenizers import decoders, normalizers

    space = normalizers.Replace(" ", "▁")
    before = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, space])
    backend.pre_tokenizer = None
    if not prefix:
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


@cache  # a command opens a file several times
def _warn_unknown(path: Path, name: str) -> None:
    logger.warning(
        "%s: expected a known name in tokenizer.ggml.pre, got %s; text is split into words as "
        "llama.cpp does by default, which may not be how the model was trained",
        path, repr(name) if name else "none",
    )  # fmt: skip
