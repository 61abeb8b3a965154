"""Generate text with a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from typing_extensions import override

from modulora_core.arguments import check_fields, checked
from modulora_core.data.rendering import check_ids, token_ids
from modulora_core.errors import DataError, OptionError, WorkError, first_line
from modulora_core.inference.opened import Runnable, tokenizer_and_loader
from modulora_core.models.chat_templates import render
from modulora_core.models.config import window_of
from modulora_core.models.stops import model_stops
from modulora_core.models.tokenizer_checks import panics_refused

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``"""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: limit of the generated text.
        temperature: 0 takes the most likely token; ``top_p`` and ``top_k`` then have no effect.
        top_p: sample from the most likely tokens that have this probability together.
        top_k: sample from this many of the most likely tokens; 0 takes all.
        repetition_penalty: divides the scores of tokens that have already come.
        seed: seed of the sampling.
        beams: beams of beam search; 1 takes one token after the other.

    Raises:
        OptionError: a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    beams: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        is_usable = self.temperature == 0 or 1e-4 <= self.temperature <= 1e4
        for name, is_valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", is_usable, "0 (greedy), or 0.0001 to 10000"),
            ("top_p", 0 < self.top_p <= 1, "a probability in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("beams", self.beams >= 1, "at least 1"),
            ("repetition_penalty", 1e-4 <= self.repetition_penalty <= 1e4, "0.0001 to 10000"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2³² − 1"),
        ):
            if not is_valid:
                raise OptionError(f"{name}: expected {expected}, got {getattr(self, name)}")


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
        prompt: the messages of a conversation; or a text, which is the user's message if the
            tokenizer has a chat template.
        sampling: greedy by default.
        raw: continue the text without the chat template.
        on_text: called with each piece of text as it is generated.
        adapter: a LoRA adapter in PEFT's format, if ``model`` is a name.

    Returns:
        the text, with counts of tokens and the time.

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
    check_ids(ids, language_model.get_input_embeddings().num_embeddings, "prompt")
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
    with panics_refused(f"tokenizer of {tokenizer.name_or_path}"):
        shown = new[:-1] if new[-1] in stops else new  # a stop may be no special token
        text = tokenizer.decode(shown, skip_special_tokens=True)
    return Generation(text, len(ids), len(new), time.perf_counter() - started)


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    streamer: TextStreamer | None = None,
    stopping: StoppingCriteria | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, generated as one batch.

    A continuation ends at a token of :func:`model_stops`, or at ``max_new_tokens``. In a batch,
    padding follows the end. Only the settings in ``sampling`` apply, and ``stopping``.

    Raises:
        WorkError: logits are NaN or infinite.
    """
    stops = model_stops(model, tokenizer)
    greedy = sampling.temperature == 0
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=min(stops, default=0),
        do_sample=not greedy,
        repetition_penalty=float(sampling.repetition_penalty),  # transformers refuses an int
        # transformers fills absent fields from the model's own config
        temperature=1.0 if greedy else float(sampling.temperature),
        top_p=1.0 if greedy else float(sampling.top_p),
        top_k=50 if greedy else sampling.top_k,
        num_beams=sampling.beams,
        no_repeat_ngram_size=0,
    )
    longest = max(map(len, prompts))
    # padded on the left, since generation continues at the right end
    ids = torch.tensor([[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.random.fork_rng(), _without_own_settings(model):
        torch.manual_seed(sampling.seed)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=StoppingCriteriaList([] if stopping is None else [stopping]),
            streamer=streamer,
        )
    return [row.tolist() for row in out[:, longest:]]


class _Finite(LogitsProcessor):
    """Raises WorkError for logits that are NaN or infinite."""

    @override
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        if not bool((scores < torch.inf).all()):  # -Inf rules a token out
            raise WorkError(
                "expected finite logits, got NaN or Inf; choose a dtype of a wider range, or "
                "download or quantize the model again"
            )
        return scores


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation_config.json, with which transformers fills absent settings."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


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
