"""Render conversations by a chat template, a program that a stranger wrote.

jinja's sandbox keeps it from files and attributes, but lets it loop and grow without end. So each
rendering runs in a process with limits (:mod:`modulora_core.models.template_worker`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modulora_core.models.workers import ask, worker

SECONDS = 5
"""The computing time of a conversation's renderings."""

MEMORY = 256 * 2**20
"""The bytes that they may take."""

LONGEST = 2**18
"""The most characters of a template: jinja compiles some 500,000 in a second."""

_LARGEST_ANSWER = 64 * 2**20
_SCRIPT = Path(__file__).with_name("template_worker.py")

Turns = tuple[Sequence[Mapping[str, Any]], bool]
"""Messages, and whether the prompt of an answer follows them."""


def render(
    tokenizer: Any, turns: Sequence[Turns], tools: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Render conversations as the tokenizer's ``apply_chat_template`` does.

    Args:
        tokenizer: has a chat template.
        turns: several conversations, such as the beginnings of one.
        tools: JSON schemas of functions that the model may call.

    Raises:
        ValueError: the template refuses them, or takes too much time or memory.
    """
    request = {
        "template": tokenizer.get_chat_template(tools=list(tools) or None),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "turns": [(list(messages), with_prompt) for messages, with_prompt in turns],
        "tools": list(tools) or None,
    }
    with worker(_SCRIPT, str(SECONDS), str(MEMORY)) as process:
        ask(process, json.dumps(request).encode("ascii"))
        assert process.stdout is not None
        line = process.stdout.readline(_LARGEST_ANSWER)
        if not line.endswith(b"\n"):  # the kernel ended it, or the answer is too long
            raise ValueError(
                f"expected a rendering within {SECONDS} seconds and {MEMORY // 2**20} MiB of "
                "memory; take another template"
            )
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ValueError(answer["error"])
    texts: list[str] = answer["texts"]
    return texts
