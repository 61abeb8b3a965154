"""Continue prompts with a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from modulora_core.arguments import checked_class
from modulora_core.errors import OptionError, WorkError
from modulora_core.models.stops import model_stops


@checked_class
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

    Raises OptionError: a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    beams: int = 1

    def __post_init__(self) -> None:
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

    Raises WorkError: logits are NaN or infinite.
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
