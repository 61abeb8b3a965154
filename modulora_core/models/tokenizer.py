"""Load a model's tokenizer, and copy it with the chat template and the generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from modulora_core.errors import ModelError, first_line
from modulora_core.models.config import vocabulary_of
from modulora_core.models.json_files import read_json
from modulora_core.models.stops import stop_ids
from modulora_core.progress import quiet

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

_ADVICE = "copy the tokenizer files of the model that it was made from into the folder"

_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class _SmallFile(BaseModel):
    model_max_length: float | None = None
    tokenizer_class: Any = None


COPIED_FILES = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""Names and patterns of the files that are copied: data only, no weights, no code."""


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(model: str, folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``folder``; messages name ``model``.

    Raises:
        ModelError: there is none that transformers can read, or its chat template is no text.
    """
    if not has_tokenizer(folder):  # some versions of transformers make an empty tokenizer of it
        raise ModelError(
            f"model {model}: no tokenizer files, such as {TOKENIZER_FILES[0]}; {_ADVICE}"
        )
    small = [
        read_json(folder / name, _SmallFile, error=ModelError)
        for name in _SMALL_FILES
        if (folder / name).exists()
    ]
    exact = any(file.tokenizer_class == "TokenizersBackend" for file in small)
    return checked_tokenizer(model, lambda: _from_folder(folder, exact))


def checked_tokenizer(
    model: str, load: Callable[[], PreTrainedTokenizerBase]
) -> PreTrainedTokenizerBase:
    """The tokenizer that ``load`` gives. Raises ModelError, as :func:`load_tokenizer`."""
    try:
        with quiet(), panics_refused("tokenizer"):
            tokenizer = load()
    except Exception as error:  # each tokenizer class fails in its own way on broken files
        raise ModelError(
            f"model {model}: no tokenizer that transformers can read ({first_line(error)}); "
            f"{_ADVICE}"
        ) from error
    _check_templates(model, tokenizer)
    return tokenizer


def _from_folder(folder: Path, exact: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer; ``exact`` takes tokenizer.json as it is.

    AutoTokenizer prefers a class of the model's, which may split text in another way.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast if exact else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def _check_templates(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that is no text. Raises ModelError."""
    found = tokenizer.chat_template
    for template in found.values() if isinstance(found, dict) else [found]:
        if template is not None and not isinstance(template, str):
            raise ModelError(
                f"model {model}: chat template: expected text, got {str(template)!r:.60}; take "
                "another template"
            )


@contextmanager
def panics_refused(subject: str) -> Iterator[None]:
    """Make a panic of the library tokenizers a ModelError about ``subject``.

    A panic of Rust is a BaseException in Python, which ``except Exception`` does not catch.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{subject}: the library tokenizers fails on it: {' '.join(str(error).split())[:200]}; "
            "take another tokenizer"
        ) from None


def copy_tokenizer(folder: Path, out: Path) -> list[str]:
    """Copy the :data:`COPIED_FILES` of ``folder``.

    Returns:
        their names, relative to ``out``.

    Raises:
        ModelError: one of them is no file.
    """
    copied = []
    for pattern in COPIED_FILES:
        for file in sorted(folder.glob(pattern)):
            if not file.is_file():
                raise ModelError(f"{file}: expected a file, got a folder, a pipe or a broken link")
            name = file.relative_to(folder)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)  # follows the symbolic links of the Hub's cache
            copied.append(name.as_posix())
    return copied


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, out: Path
) -> list[str]:
    """Write a tokenizer, and the generation config that follows from ``config``.

    The generation config names all tokens that end an answer, for every program that reads it.

    Returns:
        the files' names, relative to ``out``.
    """
    from transformers import GenerationConfig

    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        saved = [Path(file) for file in tokenizer.save_pretrained(out)]
        _name_absent_tokens(tokenizer, out / _SMALL_FILES[0])
        generation = GenerationConfig.from_model_config(config)
        size = vocabulary_of(config)
        stops = stop_ids(tokenizer, generation.eos_token_id, size=size)
        generation.eos_token_id = stops or None
        generation.save_pretrained(out)
    names = [file.relative_to(out).as_posix() for file in saved if file.is_file()]
    return [*names, "generation_config.json"]


def _name_absent_tokens(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write None for absent tokens, since AutoTokenizer's class for a model adds its defaults."""
    written = json.loads(path.read_text())
    absent = [name for name in _ROLES if getattr(tokenizer, name) is None]
    path.write_text(json.dumps(written | dict.fromkeys(absent), indent=2) + "\n")
