"""Text, instruction, chat and label data from files or the Hub: read, checked, rendered, tokenized.

:func:`load_text` and :func:`token_segments` serve perplexity and calibration, :func:`load_examples` and
:class:`Collator` finetuning. :mod:`~modulora_core.data.sources` says what a SOURCE is,
:mod:`~modulora_core.data.formats` which fields a record has.
"""

from __future__ import annotations

from modulora_core.data.examples import Collator, DataReport, Examples, load_examples
from modulora_core.data.formats import FORMATS, Format, instruction_prompt
from modulora_core.data.sources import Source
from modulora_core.data.text import load_text, token_segments

__all__ = [
    "FORMATS",
    "Collator",
    "DataReport",
    "Examples",
    "Format",
    "Source",
    "instruction_prompt",
    "load_examples",
    "load_text",
    "token_segments",
]
