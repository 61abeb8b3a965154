"""Read the messages of chats: of either spelling, with parts of text, and with calls of tools."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Json,
    PlainValidator,
    StrictStr,
    ValidationError,
    model_validator,
)

from modulora_core.options import in_one_line

Message = Mapping[str, Any]
"""One turn: ``role``, ``content``, and other fields that a chat template may read."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class Turn(BaseModel):
    """One turn of a chat, of either spelling of the fields."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: StrictStr

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        if "role" not in turn and "from" in turn:
            renamed = {"from": "role", "value": "content"}
            turn = {renamed.get(name, name): value for name, value in turn.items()}
            turn["role"] = _SHAREGPT_ROLES.get(str(turn["role"]), turn["role"])
        if turn.get("tool_calls"):
            # templates print the text None; the arguments are an object to them, a string to APIs
            calls = [_call(call) for call in turn["tool_calls"]]
            turn = {**turn, "tool_calls": calls, "content": turn.get("content") or ""}
        if isinstance(turn.get("content"), list):
            turn = {**turn, "content": "".join(map(_text_of_part, turn["content"]))}
        return turn


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"expected parts of type text, which alone is trained, got {kind!r:.40}")


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(  # noqa: TRY004  pydantic wants it
            f"tool_calls: expected a function with name and arguments, got {call!r:.50}"
        )
    if isinstance(arguments := function.get("arguments"), str):
        with contextlib.suppress(ValueError):
            return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    return call


def _said(value: Any) -> str | list[Turn]:
    """A string, or a list of messages."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("expected a string, or a list of messages with role and content")
    try:
        return [Turn.model_validate(turn) for turn in value]
    except ValidationError as error:
        raise ValueError(f"expected messages with role and content: {in_one_line(error)}") from None


Said = Annotated[str | list[Turn], PlainValidator(_said)]
"""A field that is a string or a list of messages."""


class Tools(BaseModel):
    """The functions that a record's model may call: JSON schemas, or the JSON text of them."""

    tools: list[dict[str, Any]] | Json[list[dict[str, Any]]] | None = None


def messages(said: str | Sequence[Turn], role: str) -> list[Message]:
    """The messages of a field; a string is one of ``role``."""
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    return [turn.model_dump(exclude_none=True) for turn in said]
