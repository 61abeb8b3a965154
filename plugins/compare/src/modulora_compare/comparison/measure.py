"""Compare quantizers on one model: size, perplexity before and after finetuning, speed, answers.

Packed models are in the cache of ``finetune -q``. Each model, adapter and measurement has a JSON
file in the folder of the comparison, so that the same request continues where it stopped, and
another one uses what they have in common.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from modulora_evaluate.evaluate import segment_losses
from torch import Tensor

from modulora_core.calibration import CalibrationConfig
from modulora_core.calibration.text import Weighting
from modulora_core.checkpoints.opening import is_packed, open_model
from modulora_core.checkpoints.outputs import write_file
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.data import token_segments
from modulora_core.inference.generate import generate
from modulora_core.inference.opened import open_to_run
from modulora_core.models import open_dense
from modulora_core.models.config import vocabulary_of
from modulora_core.models.generation import Sampling
from modulora_core.progress import Display, no_progress, shown
from modulora_core.progress import Progress as OnStep
from modulora_core.quantization.cache import CachedModel
from modulora_core.quantization.quality import Quality
from modulora_core.registry import Choice
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

ORIGINAL = "original"
PROMPT_TOKENS, ANSWER_TOKENS = 24, 32
RESAMPLES = 4000
LEAST_SEGMENTS = 20
"""Segments from which an interval is shown: of 4, a bootstrap leaves 0 out far too often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A comparison.

    Attributes:
        model: MODEL as on the command line, dense or in a packed file.
        train, held_out: the data to calibrate and train on, and to measure on.
        quantizers: the quantizers to compare, as ``NAME:KEY=VALUE,...``.
        steps: optimizer steps of finetuning; 0 for none.
        segments, seq_len: held-out segments, and tokens in one; training examples have as many.
        samples, sample_len: segments of calibration, and tokens in one, by default ``seq_len``.
        embeddings: the quantizer that packs the input embedding too; None leaves it dense.
        quality: the quality of quantizing (:mod:`modulora_core.quantization.quality`).
        weighting: the weighting of :class:`modulora_core.calibration.CalibrationConfig`.
        seed: the seed of the adapter, the data order and the dropout.
        matmul_precision: as in :class:`modulora_core.training.config.FinetuneConfig`.
        prompts: the number of held-out segments whose beginning the model continues.
        cache: the folder of packed models; by default that of ``finetune -q``.
    """

    model: str
    train: str
    held_out: str
    quantizers: tuple[str, ...]
    steps: int = 0
    batch_size: int = 4
    seq_len: int = 512
    segments: int = 32
    samples: int = 32
    sample_len: int | None = None
    quality: Quality = "balanced"
    weighting: Weighting | None = None
    seed: int = 0
    matmul_precision: Literal["highest", "high"] | None = None
    prompts: int = 3
    device: str | None = None
    embeddings: str | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A model at one moment.

    Attributes:
        losses: mean nats of a token, by held-out segment.
        tokens_per_second: the speed of answering; 0 without prompts.
        answers: the answers to the prompts, which are beginnings of held-out segments.
    """

    losses: list[float]
    tokens_per_second: float
    peak_memory_bytes: int
    answers: list[str]

    @property
    def perplexity(self) -> float:
        return math.exp(fmean(self.losses))


@dataclass(frozen=True, slots=True)
class Method:
    """One row: ``before`` finetuning and, if it was asked for and is possible, ``after``.

    Attributes:
        model: MODEL of commands: the packed folder, or the original.
        nbytes: the bytes of all tensors.
        bits_per_weight: the bits of a packed weight, with its share of scales.
        quantizing_seconds, quantizing_peak_bytes, training_peak_bytes: None for work that was done
            before: by an interrupted comparison, or by ``finetune -q``.
    """

    name: str
    model: str
    nbytes: int
    before: Measured
    after: Measured | None = None
    training_peak_bytes: int | None = None
    prompts: list[str] = field(default_factory=list)
    bits_per_weight: float | None = None
    quantizing_seconds: float | None = None
    quantizing_peak_bytes: int | None = None


def compare(
    request: Request, folder: Path, progress: Display, on_step: OnStep = no_progress
) -> list[Method]:
    """Measure the original and each quantizer, whose adapters and results ``folder`` gets.

    Args:
        on_step: called with a title, the steps done and their number, before each step.

    Raises:
        RequestError: the model, a quantizer or the data is refused.
        WorkError: quantizing, training or measuring failed.
    """
    for words in request.quantizers:
        Choice.parse(words, "-q").create()
    every = (None, *request.quantizers)
    more = 2 if request.steps else 0  # finetuning and measuring again
    of_original = 1 + more * isinstance(open_model(request.model), PackedCheckpoint)
    steps = Steps(progress, on_step, of_original + len(request.quantizers) * (2 + more))
    return [measure(request, folder, words, steps) for words in every]


class Steps:
    """Counts the steps of a comparison: packing, measuring, finetuning and measuring again."""

    def __init__(self, progress: Display, on_step: OnStep, total: int) -> None:
        self.progress, self.total, self._on_step, self._done = progress, total, on_step, 0

    def kept(self, title: str, path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The content of ``path``.json, made and written if it is missing."""
        file = path.with_name(f"{path.name}.json")
        self._on_step(title, self._done, self.total)
        self._done += 1
        if not file.is_file():
            write_file(file, json.dumps(make(), indent=1))
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return found


def measure(request: Request, folder: Path, words: str | None, steps: Steps) -> Method:
    """Measure one quantizer, ``NAME:KEY=VALUE,...``, or the original for None.

    Raises: as :func:`compare`.
    """
    name, progress = words or ORIGINAL, steps.progress
    calibration = CalibrationConfig(
        request.train, samples=request.samples, seq_len=request.sample_len or request.seq_len,
        weighting=request.weighting,
    )  # fmt: skip
    stem = name.translate(str.maketrans(":,/", "---", "= "))
    if words is None:
        model, facts = request.model, {}
        packed = folder / f"{stem}-{_digest(open_dense(model).file_stats())}"
    else:
        source = _source(request, words, calibration)
        model = str(source.folder)  # its name tells the weights, plugin and settings
        packed = folder / f"{stem}-{_digest(source.folder.name)}"
        facts = steps.kept(
            f"quantizing with {name}", packed, lambda: _quantized(source, name, progress)
        )
        if not is_packed(source.folder):  # somebody emptied the cache
            _quantized(source, name, progress)
    opened = open_model(model)
    nbytes = opened.nbytes if isinstance(opened, PackedCheckpoint) else _dense_bytes(opened)
    tested = _digest(request.held_out, request.seq_len, request.segments, request.prompts)
    before = steps.kept(
        f"measuring {name}",
        packed.with_name(f"{packed.name}-{tested}"),
        lambda: _measured(request, model, None, name, progress),
    )
    after: Measured | None = None
    if request.steps and isinstance(opened, PackedCheckpoint):
        digest = _digest(
            request.train, request.steps, request.batch_size, request.seq_len, request.seed,
            request.matmul_precision,
        )  # fmt: skip
        adapter = packed.with_name(f"{packed.name}-adapter-{digest}")
        facts |= steps.kept(
            f"finetuning {name}", adapter, lambda: _trained(request, model, adapter, progress)
        )
        found = steps.kept(
            f"measuring {name}, finetuned",
            adapter.with_name(f"{adapter.name}-{tested}"),
            lambda: _measured(request, model, adapter, f"{name}, finetuned", progress),
        )
        after = Measured(**found["measured"])
    return Method(
        name, model, nbytes, Measured(**before["measured"]), after, prompts=before["prompts"],
        **facts,
    )  # fmt: skip


def difference(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The mean of paired differences, and its 95 % interval by bootstrap over the segments.

    A bootstrap over fewer than :data:`LEAST_SEGMENTS` is too narrow to show.
    """
    pairs = torch.tensor(losses, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(pairs), (RESAMPLES, len(pairs)), generator=generator)
    ends = pairs[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(pairs.mean()), float(ends[0]), float(ends[1])


def has_large_embedding(model: str) -> bool:
    """Whether the input embedding has more than an eighth of the weights, as in small models."""
    opened = open_model(model)
    if isinstance(opened, PackedCheckpoint):
        config = opened.transformers_config()
        weights = sum(group["weights"] for group in opened.record.quantizers())
    else:
        config = opened.config
        weights = sum(math.prod(each.shape) for each in opened.store.tensors.values())
    hidden = getattr(config.get_text_config(), "hidden_size", 0)
    return bool(8 * vocabulary_of(config) * hidden > weights)


def _digest(*settings: Any) -> str:
    """A short name of settings: another request gets other files."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def _source(request: Request, words: str, calibration: CalibrationConfig) -> CachedModel:
    """The model that a quantizer packs into the cache."""
    choice = Choice.parse(words, "-q")
    return CachedModel(
        request.model, choice, quality=request.quality, cache=request.cache,
        embeddings=Choice.parse(request.embeddings, "embeddings") if request.embeddings else None,
        calibration=calibration if choice.create().wants_calibration else None,
    )  # fmt: skip


def _quantized(source: CachedModel, name: str, progress: Display) -> dict[str, Any]:
    with shown(progress, f"quantizing with {name}", "bytes") as show:
        found = source.quantize(show)
    return {
        "bits_per_weight": found.bits_per_weight,
        "quantizing_seconds": found.seconds or None,
        "quantizing_peak_bytes": found.peak_memory_bytes or None,
    }


def _trained(request: Request, model: str, out: Path, progress: Display) -> dict[str, Any]:
    config = FinetuneConfig(
        model=model, out=str(out), data=request.train, steps=request.steps,
        batch_size=request.batch_size, seq_len=request.seq_len, seed=request.seed,
        matmul_precision=request.matmul_precision, baseline=False,
    )  # fmt: skip
    found = finetune(config, resume=out.exists(), progress=progress)
    return {"training_peak_bytes": found.peak_memory_bytes or None}


def _measured(
    request: Request, name: str, adapter: Path | None, title: str, progress: Display
) -> dict[str, Any]:
    """The fields of :class:`Measured`, and the prompts."""
    opened = open_to_run(name, adapter=adapter, device=request.device)
    tokenizer = opened.tokenizer
    ids: Tensor = token_segments(request.held_out, tokenizer, request.seq_len, request.segments)
    prompts = [tokenizer.decode(row[:PROMPT_TOKENS]) for row in ids[: request.prompts]]
    total, sampling = len(ids) + len(prompts), Sampling(max_new_tokens=ANSWER_TOKENS)
    with PeakMemory(opened.device) as peak, shown(progress, f"loading {title}", "passes") as show:
        model = opened.load()
        losses = segment_losses(
            model, ids, progress=lambda _, done, __: show(f"measuring {title}", done, total)
        )
        given = []
        for done, prompt in enumerate(prompts, len(ids)):
            show(f"{title}: answering", done, total)
            given.append(generate((model, tokenizer), prompt, sampling, raw=True))
        show(f"measured {title}", total, total)
    seconds = sum(each.seconds for each in given)
    rate = sum(each.tokens for each in given) / seconds if given else 0.0
    del model
    gc.collect()
    measured = Measured(losses, rate, peak.nbytes, [each.text for each in given])
    return {"measured": asdict(measured), "prompts": prompts}


def _dense_bytes(source: Any) -> int:
    stored = source.store.tensors.values()
    return sum(math.prod(each.shape) * each.dtype.itemsize for each in stored)
