"""Answers of a model to some prompts of its data, without and with the adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from modulora_compare.report.page import LONGEST, Sample
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.data.formats import IGNORED
from modulora_core.errors import OptionError, WorkError
from modulora_core.inference.opened import open_to_run
from modulora_core.lora.adapted import without_adapter
from modulora_core.models.config import vocabulary_of, window_of
from modulora_core.models.generation import Sampling, continuations
from modulora_core.progress import Display, Progress, shown
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.methods import Method
from modulora_core.training.run_log import RunLog

_ROLE = re.compile(r"\A(system|user|assistant|model)[ \t]*(\n|\Z)")
"""The line that a template writes before a turn."""

COUNT, PROMPT = 5, 32
"""Number of prompts, and tokens of a prompt that is cut from a text."""


def sample_answers(
    adapter: Path, config: FinetuneConfig, log: RunLog, device: str | None, progress: Display
) -> list[Sample]:
    """Load the model of a run, and answer prompts of its evaluation data, or of its data.

    Raises:
        OptionError: the data was given in Python, so that the run's config does not name it; or the
            model's window has no room for an answer.
        RequestError: the model, the adapter or the data can't be read.
    """
    source = config.eval_data or config.data
    if source is None:
        raise OptionError(
            f"--samples: expected a run whose {adapter}/finetune.yaml names its data, got one with "
            "records from Python; leave --samples out"
        )
    opened = open_to_run(
        log.model, adapter=adapter, dtype=config.dtype, device=device, mapped=config.mapped,
        parity_check=config.parity_check,
    )  # fmt: skip
    window = opened.window or 2**20
    if window <= LONGEST:
        raise OptionError(
            f"--samples: expected a model with a context of more than {LONGEST} tokens, the "
            f"longest answer, got {window}; leave --samples out"
        )
    assert isinstance(opened.origin, PackedCheckpoint)  # a dense model with an adapter is refused
    tokenizer = opened.tokenizer
    vocabulary = vocabulary_of(opened.origin.transformers_config())
    examples = Method().examples(source, config, tokenizer, vocabulary)
    with shown(progress, "loading the model", "layers"):
        model = opened.load()
    with shown(progress, "answering", "tokens") as show:
        return answers(model, tokenizer, examples, show)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Any, show: Progress
) -> list[Sample]:
    """Answer the prompts of some examples greedily, in one batch without and one with the adapter.

    Args:
        model: a model with an active adapter; it is in evaluation mode afterwards.
        tokenizer: its tokenizer.
        examples: ``input_ids`` and ``labels``.
        show: the bar.
    """
    window = window_of(model.config) or 2**20
    most = min(COUNT, len(examples))
    pairs = [_split(examples[i * len(examples) // most]) for i in range(most)]
    prompts = [prompt[LONGEST - window :] for prompt, _ in pairs]

    def texts(rows: list[list[int]]) -> list[str]:
        decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def answered(done: int) -> list[str]:
        bar = _Bar(show, done)
        try:
            return texts(continuations(model, tokenizer, prompts, Sampling(LONGEST), stopping=bar))
        except WorkError:  # the curves of a bad training are of use
            return ["(no answer: NaN or infinite logits)"] * len(prompts)

    model.eval()
    with torch.no_grad():
        with without_adapter(model):
            before = answered(0)
        after = answered(LONGEST)
    show("answering", 2 * LONGEST, 2 * LONGEST)  # answers may end early
    expected = texts([answer[:LONGEST] for _, answer in pairs])
    asked = [question(prompt, tokenizer) for prompt in prompts]
    return list(map(Sample, asked, expected, before, after))


def question(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The last turn of a chat's prompt, without the words of its template; else the whole text."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    runs = [[*run] for is_special, run in groupby(ids, special.__contains__) if not is_special]
    texts = [text.strip() for text in tokenizer.batch_decode(runs)]
    turns = [_ROLE.sub("", text).strip() for text in texts]
    if turns == texts:
        return str(tokenizer.decode([*ids], skip_special_tokens=True)).strip()
    return next((turn for turn in reversed(turns) if turn), "")


class _Bar(StoppingCriteria):
    """Moves the bar with each token. ``before`` tokens came before these answers."""

    def __init__(self, show: Progress, before: int) -> None:
        self._show, self._tokens = show, before

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        self._tokens += 1
        self._show("answering", self._tokens, 2 * LONGEST)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _split(example: Any) -> tuple[list[int], list[int]]:
    """The prompt of an example and its first answer; of a text, its beginning and the rest."""
    ids, labels = example["input_ids"], example["labels"]
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    if start == 0:
        start = min(PROMPT, max(1, len(ids) // 2))
    end = next((i for i in range(start, len(ids)) if labels[i] == IGNORED), len(ids))
    return ids[:start], ids[start:end]
