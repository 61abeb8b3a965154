"""Generate text with a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from typing_extensions import override

from modulora_core.arguments import checked
from modulora_core.data.rendering import check_ids, token_ids
from modulora_core.errors import DataError, first_line
from modulora_core.inference.opened import Runnable, tokenizer_and_loader
from modulora_core.models.config import vocabulary_of, window_of
from modulora_core.models.generation import Sampling, continuations
from modulora_core.models.stops import model_stops
from modulora_core.models.tokenizer import render

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``"""


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text. ``seconds`` includes the prompt."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@checked
def generate(
    model: Runnable,
    prompt: str | Sequence[Message],
    sampling: Sampling | None = None,
    *,
    raw: bool = False,
    on_text: Callable[[str], None] | None = None,
    adapter: str | Path | None = None,
) -> Generation:
    """Answer or continue ``prompt``.

    Args:
        model: MODEL as on the command line, the result of ``open_to_run``, or a loaded model with
            its tokenizer, ``(model, tokenizer)``.
        adapter: a LoRA adapter in PEFT's format, if ``model`` is a name.
        prompt: the messages of a conversation; or a text, which is the user's message if the
            tokenizer has a chat template.
        sampling: greedy by default.
        raw: continue the text without the chat template.
        on_text: called with each piece of text as it is generated.

    Raises:
        DataError: the prompt is empty, no valid text, or too long for the model's window; or it
            needs a chat template and the tokenizer has none.
        RequestError: the model cannot be opened.
        WorkError: logits are NaN or infinite.
    """
    sampling = sampling or Sampling()
    tokenizer, load = tokenizer_and_loader(model, adapter)
    if isinstance(prompt, str) and not raw and tokenizer.chat_template is not None:
        prompt = [{"role": "user", "content": prompt}]
    ids = _prompt_ids(tokenizer, prompt)
    language_model = load()
    check_ids(ids, vocabulary_of(language_model.config), "prompt")
    window = window_of(language_model.config)
    if window is not None and len(ids) + sampling.max_new_tokens > window:
        raise DataError(
            f"prompt of {len(ids)} tokens and {sampling.max_new_tokens} new tokens: expected at "
            f"most the model's window of {window}; shorten one of them"
        )
    stops = model_stops(language_model, tokenizer)
    streamer = None if on_text is None else _Streamer(tokenizer, on_text, stops)
    started = time.perf_counter()
    with torch.inference_mode():
        (new,) = continuations(language_model, tokenizer, [ids], sampling, streamer)
    shown = new[:-1] if new[-1] in stops else new  # a stop may be no special token
    text = tokenizer.decode(shown, skip_special_tokens=True)
    return Generation(text, len(ids), len(new), time.perf_counter() - started)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    _check_prompt(prompt)
    if isinstance(prompt, str):
        (ids,) = token_ids(tokenizer, [prompt], add_special_tokens=True)
    elif tokenizer.chat_template is None:
        raise DataError(
            "conversation: the model's tokenizer has no chat template; give a plain text "
            "(generate --raw)"
        )
    else:
        try:
            (text,) = render(tokenizer, [(prompt, True)])
        except ValueError as error:
            raise DataError(
                f"the tokenizer's chat template refuses the prompt: {first_line(error)}"
            ) from error
        (ids,) = token_ids(tokenizer, [text])
    if not ids:
        raise DataError("prompt: expected some text, got none")
    return list(ids)


def _check_prompt(prompt: str | Sequence[Message]) -> None:
    """Refuse other types than text, and surrogates, which Python makes of bytes without UTF-8."""
    messages = prompt if isinstance(prompt, list | tuple) else [{"content": prompt}]
    for message in messages:
        text = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(text, str):
            raise DataError(
                f"prompt: expected a text, or messages with role and content, got {prompt!r:.80}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                "prompt: expected text in UTF-8, got other bytes after "
                f"{text[: error.start][-20:]!r}"
            ) from None


class _Streamer(TextStreamer):
    """Passes text to a function instead of printing it, without the token that ends it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None],
        stops: Sequence[int],
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stops = on_text, stops

    @override
    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in self._stops:
            super().put(value)

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
