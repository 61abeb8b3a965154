"""``modulora chat``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from modulora_core.cli.arguments import (
    Adapter,
    Device,
    Dtype,
    Mapped,
    MaxNewTokens,
    Model,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from modulora_core.cli.terminal import Report, terminal
from modulora_core.errors import DataError

System = Annotated[
    str | None,
    typer.Option(
        "--system", metavar="TEXT", show_default=False, help="A system message to begin with."
    ),
]

HELP = "Type a message and press Enter. Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D ends it."

COMMAND = re.compile(r"/[a-z]+")
"""What looks like one of ours."""

Messages = list[dict[str, str]]


def command(
    model: Model,
    adapter: Adapter = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    dtype: Dtype = "auto",
    device: Device = None,
    mapped: Mapped = False,
    seed: Seed = 0,
) -> Report:
    """Talk with a model.

    The model's tokenizer must have a chat template. Messages are read from standard input, a line each.

    Examples:
      modulora chat smollm2-packed
      modulora chat smollm2-packed --adapter my-adapter --temperature 0.7 --top-p 0.9
      echo "What is a module?" | modulora chat smollm2-packed --json
    """
    from modulora_core.inference.generate import Sampling, generate
    from modulora_core.inference.loading import open_to_run

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    opened = open_to_run(model, adapter=adapter, dtype=dtype, device=device, mapped=mapped)
    if opened.tokenizer.chat_template is None:
        raise DataError(
            f"model {model}: its tokenizer has no chat template, so it can't chat; use `modulora generate --raw`"
        )
    language_model = opened.load()

    def answer(messages: Messages, on_text: Callable[[str], None]) -> str:
        return generate(language_model, opened.tokenizer, messages, sampling, on_text=on_text).text

    begin = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    terminal().note(HELP)
    while (line := _read()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(begin)
        elif COMMAND.fullmatch(line or ""):
            terminal().note(f"no such command: {line}. {HELP}")
        elif line:
            messages += _turn(messages, line, answer)
    return Report({"messages": messages})


def _turn(
    messages: Messages, line: str, answer: Callable[[Messages, Callable[[str], None]], str]
) -> Messages:
    """What a message adds to the conversation: itself and the answer, as far as it came; nothing where it can't be answered.

    Somebody who types is told what is wrong, and goes on; what comes through a pipe ends with it.
    """
    said: list[str] = []

    def on_text(text: str) -> None:
        said.append(text)
        terminal().write(text)

    question = {"role": "user", "content": line}
    try:
        text = answer([*messages, question], on_text)
    except DataError as error:
        if not sys.stdin.isatty():
            raise
        terminal().note(f"{error} (the message is left out; /reset forgets the conversation)")
        return []
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        text = "".join(said)
    terminal().write("\n")
    return [question, {"role": "assistant", "content": text}]


def _read() -> str | None:
    """The next line, without its end; None when there are no more."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
