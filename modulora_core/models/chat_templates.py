"""Render conversations by a tokenizer's chat template, which transformers runs in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modulora_core.errors import first_line

Turns = tuple[Sequence[Mapping[str, Any]], bool]
"""Messages, and whether the prompt of an answer follows them."""


def render(
    tokenizer: Any, turns: Sequence[Turns], tools: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Render conversations by the tokenizer's ``apply_chat_template``.

    Args:
        tokenizer: has a chat template.
        turns: several conversations, such as the beginnings of one.
        tools: JSON schemas of functions that the model may call.

    Raises:
        ValueError: the template refuses them.
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
