"""Read plain text, and cut it into segments of tokens, for perplexity and for calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modulora_core.data.formats import FIELDS, Conversation, conversations, detect, texts
from modulora_core.data.rendering import Renderer, token_ids
from modulora_core.data.sources import Source, load_records, source_name
from modulora_core.errors import DataError, OptionError


def load_text(source: Source, tokenizer: Any = None) -> str:
    """Read the ``text`` fields of ``source``, or its other records as they are trained.

    Blank lines join them.

    Args:
        tokenizer: its chat template renders records of other formats, else they are plain text.
    """
    records = load_records(source, detect, FIELDS)
    if all(isinstance(record.fields.get("text"), str) for record in records):
        read = [record.fields["text"] for record in records]
    elif (format_ := detect(records)) == "text":
        read = texts(records)
    else:
        renderer = None if tokenizer is None else Renderer(tokenizer)
        read = [_training_text(each, renderer) for each in conversations(records, format_)]
    text = "\n\n".join(read)
    if not text.strip():
        raise DataError(
            f"{records[0].place}: expected text, got only empty records in {source_name(source)}"
        )
    return text


def _training_text(conversation: Conversation, renderer: Renderer | None) -> str:
    if renderer is not None and renderer.has_template:
        return renderer.render(conversation)[-1].text
    if conversation.plain is not None:
        return "".join(conversation.plain)
    return "\n\n".join(message["content"] for message in conversation.messages)


def token_segments(
    source: Source,
    tokenizer: Any,
    seq_len: int,
    segments: int | None = None,
    *,
    seed: int | None = None,
) -> Tensor:
    """Cut the text of ``source`` into consecutive, non-overlapping segments of tokens, without BOS.

    Args:
        seq_len: tokens in a segment. The text's last tokens, fewer than that, are left out.
        segments: the most segments; None for all. The text may hold fewer.
        seed: draw the segments at random, without repeats, instead of taking the first.

    Returns:
        int64 ``[n, seq_len]`` on the CPU, ``1 <= n``.

    Raises OptionError, DataError, MissingExtraError.
    """
    for name, value in (("seq_len", seq_len), ("segments", 1 if segments is None else segments)):
        if value < 1:
            raise OptionError(f"{name}: expected at least 1, got {value}")
    ids = torch.tensor(token_ids(tokenizer, [load_text(source, tokenizer)])[0], dtype=torch.int64)
    if len(ids) < seq_len:
        raise DataError(
            f"{source_name(source)}: expected at least seq_len {seq_len} tokens, got {len(ids)}; "
            "give more text or a smaller seq_len"
        )
    cut = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    if seed is not None:
        cut = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))]
    return cut[:segments].clone()
