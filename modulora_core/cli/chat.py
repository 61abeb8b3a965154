"""``modulora chat``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Annotated

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.errors import DataError

HELP = (
    "Type a message and press Enter. Ctrl-C stops an answer, /reset forgets the conversation, "
    "/exit or Ctrl-D ends it."
)

Messages = list[dict[str, str]]
Answer = Callable[[Messages, Callable[[str], None]], str]
"""``answer(messages, on_text)`` streams the answer to ``on_text``, and returns it."""

System = Annotated[str | None, option("--system TEXT", "Begin with this system message.")]


def command(
    model: shared.Model,
    adapter: shared.Adapter = None,
    system: System = None,
    max_new_tokens: shared.MaxNewTokens = 512,
    temperature: shared.Temperature = 0.0,
    top_p: shared.TopP = 1.0,
    top_k: shared.TopK = 0,
    repetition_penalty: shared.RepetitionPenalty = 1.0,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    mapped: shared.Mapped = False,
    parity_check: shared.ParityCheck = True,
    seed: shared.Seed = 0,
) -> Report:
    """Chat with a model.

    The model's tokenizer must have a chat template. Each line of standard input is a message.

    Examples:
        modulora chat smollm2-packed
        modulora chat smollm2-packed --adapter my-adapter --temperature 0.7
        echo "Name a module." | modulora chat smollm2-packed --json
    """
    from modulora_core.inference.generate import generate
    from modulora_core.inference.opened import open_to_run
    from modulora_core.models.generation import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    opened = open_to_run(
        model, adapter=adapter, dtype=dtype, device=device, mapped=mapped, parity_check=parity_check
    )
    if opened.tokenizer.chat_template is None:
        raise DataError(
            f"model {model}: expected a tokenizer with a chat template, got one without; "
            "use `modulora generate --raw`"
        )
    loaded = opened.load(), opened.tokenizer

    def answer(messages: Messages, on_text: Callable[[str], None]) -> str:
        return generate(loaded, messages, sampling, on_text=on_text).text

    begin = [{"role": "system", "content": system}] if system else []
    return Report({"messages": _converse(begin, answer)})


def _converse(begin: Messages, answer: Answer) -> Messages:
    """Answer the lines of standard input until it ends, or says /exit."""
    messages = list(begin)
    terminal().note(HELP)
    while (line := _read()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(begin)
        elif re.fullmatch(r"/[a-z]+", line or ""):
            terminal().note(f"no such command: {line}. {HELP}")
        elif line:
            messages += _turn(messages, line, answer)
    return messages


def _turn(messages: Messages, line: str, answer: Answer) -> Messages:
    """Return the message and its answer, or nothing if the model can't answer.

    An error or Ctrl-C ends the answer if stdin is a terminal, and else the command.
    """
    streamed: list[str] = []

    def on_text(text: str) -> None:
        streamed.append(text)
        terminal().write(text)

    question = {"role": "user", "content": line}
    try:
        text = answer([*messages, question], on_text)
    except (DataError, KeyboardInterrupt) as error:
        if not sys.stdin.isatty():
            raise
        if isinstance(error, DataError):
            terminal().note(f"{error} (the message is left out; /reset forgets the conversation)")
            return []
        text = "".join(streamed)
    terminal().write("\n")
    return [question, {"role": "assistant", "content": text}]


def _read() -> str | None:
    """Read the next line. None ends the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
