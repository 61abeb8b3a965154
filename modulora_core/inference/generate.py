"""Text from a model, streamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from modulora_core.errors import DataError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``"""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. A temperature of 0 takes the likeliest each time; the rest then has no effect but
    ``repetition_penalty``.

    Raises:
        OptionError: a value outside of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"max-new-tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise OptionError(f"temperature: expected 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top-p: expected a share in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise OptionError(f"top-k: expected 0 (all) or more, got {self.top_k}")
        if self.repetition_penalty <= 0:
            raise OptionError(
                f"repetition-penalty: expected more than 0, got {self.repetition_penalty}"
            )

    def arguments(self) -> dict[str, Any]:
        """For transformers' ``generate``. Everything is said, so that a model's own defaults don't come in."""
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature == 0:
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **chosen,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text, and how fast it came. ``seconds`` includes the prompt."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt``.

    Args:
        prompt: a text, continued as it is; or the messages of a conversation, put into the chat template.
        sampling: by default greedy.
        on_text: gets each piece of text as soon as it is sure.

    Raises:
        DataError: the prompt has no tokens or no valid text, leaves no room in the model's window, or needs a chat template that
            the tokenizer doesn't have.
    """
    sampling = sampling or Sampling()
    ids = _prompt_ids(tokenizer, prompt)
    _check_window(model, ids.shape[1], sampling.max_new_tokens)
    ids = ids.to(model.device)
    started = time.perf_counter()
    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else model.generation_config.eos_token_id
    )
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        streamer = None if on_text is None else _Streamer(tokenizer, on_text)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), streamer=streamer, pad_token_id=pad if isinstance(pad, int) else pad[0],
            **sampling.arguments(),
        )  # fmt: skip
    new = output[0, ids.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Generation(text, ids.shape[1], new.numel(), time.perf_counter() - started)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]
) -> torch.Tensor:
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        _check_text(text)
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    elif tokenizer.chat_template is None:
        raise DataError(
            "conversation: the model's tokenizer has no chat template; give a plain text (generate --raw)"
        )
    else:
        ids = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if ids.numel() == 0:
        raise DataError("prompt: expected some text, got none")
    prompt_ids: torch.Tensor = ids.long()
    return prompt_ids


def _check_text(text: str) -> None:
    """Python keeps bytes of a terminal or a pipe that aren't UTF-8 as surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"prompt: expected text in UTF-8, got other bytes after {text[: error.start][-20:]!r}"
        ) from None


def _check_window(model: PreTrainedModel, prompt: int, new: int) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and prompt + new > window:
        raise DataError(
            f"prompt of {prompt} tokens and {new} new ones: the model's window is {window}; shorten one of them"
        )


class _Streamer(TextStreamer):
    """Hands text on instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002 - the base's signature
        if text:
            self._on_text(text)
