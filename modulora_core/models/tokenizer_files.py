"""The files beside the weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""The names that transformers gives the files of a tokenizer."""

COPIED_FILES = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""Names and patterns of the files that are taken along: data only, no weights, no code."""


def copy_files(folder: Path, out: Path) -> list[str]:
    """Copy those of :data:`COPIED_FILES` that ``folder`` has. Returns their names, relative to ``out``."""
    copied = []
    for pattern in COPIED_FILES:
        for file in sorted(folder.glob(pattern)):
            name = file.relative_to(folder)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)  # follows the symbolic links of the Hub's cache
            copied.append(name.as_posix())
    return copied


def write_files(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, out: Path
) -> list[str]:
    """Write a tokenizer with its chat template, and the generation config that follows from ``config``.

    Returns the files' names, relative to ``out``.
    """
    from transformers import GenerationConfig

    out.mkdir(parents=True, exist_ok=True)
    written = [
        Path(file).relative_to(out).as_posix()
        for file in tokenizer.save_pretrained(out)
        if Path(file).is_file()
    ]
    GenerationConfig.from_model_config(config).save_pretrained(out)
    return [*written, "generation_config.json"]
