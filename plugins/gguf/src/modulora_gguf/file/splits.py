"""Split text into words as a byte-level BPE was trained to, by the name in a GGUF file.

The field ``tokenizer.ggml.pre`` names the split. The patterns here are published in models'
tokenizer.json files and in llama.cpp; transformers has the others. Each splits the pieces that the
one before it left.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

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

LIKE_LLAMA_3 = {"falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3",
                 "midm-2.0", "pixtral", "tekken"}  # fmt: skip
"""Names with BOS before a text, unless the file says otherwise. A word of the vocabulary is one
token, whatever the merges say."""


def pre_tokenizer(path: Path, name: str) -> Any:
    """The split called ``name``, then bytes as letters. A line warns of an unknown name."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    patterns = _SPLITS.get(name)
    if name in GGUF_PRE_TOKENIZER_SPLITS:
        patterns = (GGUF_PRE_TOKENIZER_SPLITS[name],)
    elif name in _LIKE_GPT2:
        patterns = (_GPT2,)
    elif patterns is None:
        _warn_unknown(path, name)
        patterns = _SPLITS["default"]
    steps = [pre_tokenizers.Split(Regex(one), "isolated") for one in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, byte_level])


@cache  # a command opens a file several times
def _warn_unknown(path: Path, name: str) -> None:
    logger.warning(
        "%s: expected a known name in tokenizer.ggml.pre, got %s; text is split into words as "
        "llama.cpp does by default, which may not be how the model was trained",
        path, repr(name) if name else "none",
    )  # fmt: skip
