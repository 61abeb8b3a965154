"""Render chat templates in a process of its own, within limits of time and memory.

:mod:`modulora_core.models.chat_templates` runs this file as a script. Each line of its standard
input is a request, each line of its output the answer::

    {"template": jinja, "special": {"bos_token": ...}, "turns": [[messages, with_prompt], ...],
     "tools": [...] or null}
    {"texts": [...]}   or   {"error": "the template's or jinja's message"}

A template may loop or grow without end, inside one operation of C code too. So the operating system
enforces the limits: it ends this process after its time, and refuses more memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_LONGEST_ERROR = 500


class _Tokenizer(PreTrainedTokenizerBase):
    """A tokenizer without a vocabulary: transformers renders by it as by the real one."""

    def __init__(self, template: str, special: dict[str, Any]) -> None:
        self.chat_template, self._special = template, special

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        return self._special


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    tokenizer = _Tokenizer(request["template"], request["special"])
    try:
        return {
            "texts": [
                tokenizer.apply_chat_template(
                    messages,
                    tools=request["tools"],
                    tokenize=False,
                    add_generation_prompt=with_prompt,
                )
                for messages, with_prompt in request["turns"]
            ]
        }
    except MemoryError:
        raise
    except Exception as error:  # a template computes anything
        return {"error": (str(error) or type(error).__name__)[:_LONGEST_ERROR]}


def limit_memory(nbytes: int) -> None:
    """Limit the memory that this process takes from now on. Only Linux supports it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + nbytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def limit_time(seconds: float) -> None:
    """End this process after so many seconds of computing; 0 turns the limit off."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve(seconds: float, nbytes: int) -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # nothing else prints among the answers
    limit_memory(nbytes)
    for line in sys.stdin.buffer:
        limit_time(seconds)
        answer = json.dumps(_answer(json.loads(line)))
        limit_time(0)
        answers.write(f"{answer}\n")
        answers.flush()


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
