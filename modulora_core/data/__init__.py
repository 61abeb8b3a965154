"""Read training and evaluation data from files or the Hub: checked, rendered, tokenized.

:func:`load_examples` and :class:`Collator` serve finetuning, :func:`load_text` and
:func:`token_segments` perplexity and calibration. :mod:`~modulora_core.data.sources` explains
SOURCE, :mod:`~modulora_core.data.formats` the fields of a record, and
:mod:`~modulora_core.data.templates` how other columns become fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modulora_core.data.formats import FORMATS, Format, instruction_prompt
from modulora_core.data.sources import Source
from modulora_core.data.templates import Template

if TYPE_CHECKING:
    from modulora_core.data.examples import Collator, DataReport, Examples, load_examples
    from modulora_core.data.text import load_text, token_segments

__all__ = [
    "FORMATS",
    "Collator",
    "DataReport",
    "Examples",
    "Format",
    "Source",
    "Template",
    "instruction_prompt",
    "load_examples",
    "load_text",
    "token_segments",
]


def __getattr__(name: str) -> Any:
    """Import torch for examples and tokens only: records are read without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modulora_core.data import examples, text

    return getattr(examples if hasattr(examples, name) else text, name)
