"""Read preference data: a prompt, a chosen answer and a rejected one.

========================== ==========================================================
fields                     meaning
========================== ==========================================================
prompt, chosen, rejected   strings; or lists of messages (role, content), or a mix
chosen, rejected           lists of messages that begin with the same turns, the prompt
========================== ==========================================================

A string becomes a message if the tokenizer has a chat template, as in the other formats.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from modulora_core.data.files import Record
from modulora_core.data.formats import FIELDS, Conversation, checked
from modulora_core.data.messages import Message, Said, messages
from modulora_core.data.rendering import Renderer, check_ids
from modulora_core.data.sources import Source, load_records, source_name
from modulora_core.errors import DataError

logger = logging.getLogger(__name__)


class _Preference(BaseModel):
    prompt: Said | None = None
    chosen: Said
    rejected: Said


_RULE = (
    "preferences: expected prompt, chosen and rejected, as strings or lists of messages; or chosen "
    "and rejected as lists of messages that begin with the same turns, the prompt"
)


def load_preferences(
    source: Source, tokenizer: Any, *, seq_len: int, vocabulary: int | None = None
) -> list[dict[str, Any]]:
    """Read ``source`` as rows for TRL: ``{"prompt", "chosen", "rejected"}``.

    With a chat template all three are lists of messages, without one strings. Rows whose prompt has
    ``seq_len`` tokens or more are left out and counted in a warning.

    Args:
        seq_len: limit of a prompt with an answer, in tokens.
        vocabulary: the number of tokens that the model knows; None checks no token.
    """
    renderer = Renderer(tokenizer)

    def converted(records: Sequence[Record]) -> list[tuple[dict[str, Any], int]]:
        return [_row(record, renderer, vocabulary) for record in records]

    read = converted(load_records(source, converted, FIELDS))
    kept = [row for row, length in read if length < seq_len]
    name = source_name(source)
    if not kept:
        raise DataError(
            f"{name}: expected prompts of fewer than seq_len {seq_len} tokens, got none in "
            f"{len(read)} records; raise seq_len"
        )
    if len(kept) < len(read):
        logger.warning(
            "%s: %d of %d records are left out because their prompt alone has seq_len %d tokens "
            "or more", name, len(read) - len(kept), len(read), seq_len,
        )  # fmt: skip
    return kept


def check_preferences(records: Sequence[Record]) -> None:
    """Check each record as far as no tokenizer is needed. Raises DataError."""
    for record in records:
        _read(record)


def _read(
    record: Record,
) -> tuple[_Preference, tuple[list[Message], list[Message], list[Message]]]:
    """The fields of a record, and the messages of the prompt and of both answers."""
    if missing := {"chosen", "rejected"}.difference(record.fields):
        names = ", ".join(sorted(map(str, record.fields)))[:200]
        raise DataError(
            f"{record.place}: {_RULE}; got no {' and no '.join(sorted(missing))}, and the fields "
            f"{names}"
        )
    if record.fields.get("tools"):
        raise DataError(f"{record.place}: tools: dpo reads none; leave the field out")
    try:
        read = checked(record, _Preference)
    except DataError as error:
        raise DataError(f"{error}; {_RULE}") from None
    return read, _turns(read, record.place)


def _row(record: Record, renderer: Renderer, vocabulary: int | None) -> tuple[dict[str, Any], int]:
    """The row of a record, and the number of tokens in its prompt."""
    read, (prompt, chosen, rejected) = _read(record)
    strings = (read.prompt, read.chosen, read.rejected)
    for turns, answer in ((chosen, read.chosen), (rejected, read.rejected)):
        plain = (read.prompt, answer) if all(isinstance(s, str) for s in strings) else None
        asked = Conversation((*prompt, *turns), plain, record.place)  # type: ignore[arg-type]
        rendering = renderer.render(asked)[-1]
        if vocabulary is not None:
            check_ids(renderer.encode([rendering])[0][0], vocabulary, record.place)
    ids = renderer.encode_prompt(rendering)
    if not renderer.has_template:
        return dict(zip(("prompt", "chosen", "rejected"), strings, strict=True)), len(ids)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, len(ids)


def _turns(read: _Preference, place: str) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages of the prompt and of both answers."""
    chosen, rejected = (messages(answer, "assistant") for answer in (read.chosen, read.rejected))
    prompt = [] if read.prompt is None else messages(read.prompt, "user")
    if not isinstance(read.prompt, list) and (shared := _shared(chosen, rejected)):
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise DataError(
            f"{place}: expected a prompt, or chosen and rejected messages that begin with the same "
            "turns, got none"
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if [turn["role"] for turn in answer] != ["assistant"]:
            roles = ", ".join(turn["role"] for turn in answer) or "no turn"
            raise DataError(
                f"{place}: {name}: expected one turn of the assistant after the prompt, got {roles}"
            )
    return prompt, chosen, rejected


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Number of turns that both begin with, at most all but the last."""
    longest = min(len(chosen), len(rejected)) - 1
    same = (a == b for a, b in zip(chosen[:longest], rejected[:longest], strict=True))
    return next((i for i, equal in enumerate(same) if not equal), longest)
