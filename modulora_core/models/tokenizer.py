"""Load a model's tokenizer, and copy it with the chat template and the generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


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
    """Load the tokenizer of ``folder``; messages name ``model``. Raises ModelError."""
    if not has_tokenizer(folder):  # some versions of transformers make an empty tokenizer of it
        raise ModelError(
            f"model {model}: no tokenizer files, such as {TOKENIZER_FILES[0]}; {_ADVICE}"
        )
    small = folder / "tokenizer_config.json"
    values = read_json(small, dict[str, Any], error=ModelError) if small.exists() else {}
    exact = values.get("tokenizer_class") == "TokenizersBackend"
    return checked_tokenizer(model, lambda: _from_folder(folder, exact))


def checked_tokenizer(
    model: str, load: Callable[[], PreTrainedTokenizerBase]
) -> PreTrainedTokenizerBase:
    """The tokenizer that ``load`` gives. Raises ModelError, as :func:`load_tokenizer`."""
    try:
        with quiet():
            return load()
    except Exception as error:  # each tokenizer class fails in its own way on broken files
        raise ModelError(
            f"model {model}: no tokenizer that transformers can read ({first_line(error)}); "
            f"{_ADVICE}"
        ) from error


def _from_folder(folder: Path, exact: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer; ``exact`` takes tokenizer.json as it is.

    AutoTokenizer prefers a class of the model's, which may split text in another way.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast if exact else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def copy_tokenizer(folder: Path, out: Path) -> list[str]:
    """Copy the :data:`COPIED_FILES` of ``folder``.

    Returns:
        their names, relative to ``out``.

    Raises ModelError: one of them is no file.
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
        _name_absent_tokens(tokenizer, out / "tokenizer_config.json")
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


Turns = tuple[Sequence[Mapping[str, Any]], bool]
"""Messages, and whether the prompt of an answer follows them."""


def render(
    tokenizer: Any, turns: Sequence[Turns], tools: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Render conversations by the tokenizer's ``apply_chat_template``.

    Args:
        turns: several conversations, such as the beginnings of one.
        tools: JSON schemas of functions that the model may call.

    Raises ValueError: the template refuses them.
    """
    try:
        return [
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=with_prompt,
            )
            for messages, with_prompt in turns
        ]
    except Exception as error:  # a template computes anything
        raise ValueError(first_line(error)) from error
