"""Compare quantizers on one model: size, perplexity before and after finetuning, speed, answers.

Each method's results are a JSON file in the folder of the comparison, so that the same request
continues where it stopped.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from modulora_core.adapters.peft_format import CONFIG_FILE
from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.checkpoint import PackedCheckpoint, is_packed, open_any
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.data import token_segments
from modulora_core.inference.evaluate import segment_losses
from modulora_core.inference.generate import Sampling, generate
from modulora_core.inference.loading import open_to_run
from modulora_core.progress import Bars
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

ORIGINAL = "original"
PROMPT_TOKENS, ANSWER_TOKENS, PROMPTS = 24, 32, 3
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Request:
    """A comparison.

    Attributes:
        model: MODEL as on the command line, dense or in a packed file.
        train, held_out: the data to calibrate and train on, and to measure on.
        quantizers: as ``NAME:KEY=VALUE,...``.
        steps: optimizer steps of finetuning; 0 for none.
        segments, seq_len: held-out segments, and tokens in one.
        samples: segments of calibration.
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
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A model at one moment.

    Attributes:
        losses: mean nats of a token, by held-out segment.
        answers: to the prompts, which are beginnings of held-out segments.
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
    """One row: ``before`` finetuning and, if it was asked for and is possible, ``after``."""

    name: str
    nbytes: int
    before: Measured
    after: Measured | None = None
    training_peak_bytes: int | None = None
    prompts: list[str] = field(default_factory=list)


def compare(request: Request, folder: Path, bars: Bars) -> list[Method]:
    """Measure the original and each quantizer, which get folders in ``folder``.

    Raises:
        RequestError: the model, a quantizer or the data is refused.
        WorkError: quantizing, training or measuring failed.
    """
    choices = [Choice.parse(words, "-q") for words in request.quantizers]
    for choice in choices:
        choice.create()
    named = zip((ORIGINAL, *request.quantizers), (None, *choices), strict=True)
    return [_method(request, folder, name, choice, bars) for name, choice in named]


def difference(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The mean of paired differences, and its 95 % interval by bootstrap over the segments."""
    pairs = torch.tensor(losses, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(pairs), (RESAMPLES, len(pairs)), generator=generator)
    ends = pairs[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(pairs.mean()), float(ends[0]), float(ends[1])


def _method(request: Request, folder: Path, name: str, choice: Choice | None, bars: Bars) -> Method:
    stem = name.translate(str.maketrans(":,/", "---", "= "))
    kept = folder / f"{stem}.json"
    asked = {**asdict(request), "quantizers": name}
    found = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    if found.get("request") == json.loads(json.dumps(asked)):
        return _read(found["method"])
    settings = request.model, request.train, request.samples, request.seq_len
    packed = folder / f"{stem}-{_digest(*settings)}"
    model = request.model if choice is None else _packed(request, packed, choice, bars)
    opened = open_any(model)
    nbytes = opened.nbytes if isinstance(opened, PackedCheckpoint) else _dense_bytes(opened)
    before, prompts = _measured(request, model, None, name, bars)
    after, peak = None, None
    if request.steps and isinstance(opened, PackedCheckpoint):
        digest = _digest(*settings, request.steps, request.batch_size)
        adapter = folder / f"{stem}-adapter-{digest}"
        peak = _trained(request, model, adapter, bars)
        after, _ = _measured(request, model, adapter, f"{name}, finetuned", bars)
    method = Method(name, nbytes, before, after, peak, prompts)
    kept.write_text(json.dumps({"request": asked, "method": asdict(method)}, indent=1), "utf-8")
    return method


def _packed(request: Request, out: Path, choice: Choice, bars: Bars) -> str:
    if not is_packed(out):
        calibration = None
        if choice.create().spec.calibration != "none":
            calibration = CalibrationConfig(
                request.train, samples=request.samples, seq_len=request.seq_len
            )
        with bars(f"quantizing with {choice.quantizer}", "bytes") as show:
            quantize(
                request.model, out, choice.quantizer, choice.options, calibration=calibration,
                resume=True, progress=show,
            )  # fmt: skip
    return str(out)


def _digest(*settings: Any) -> str:
    """A short name of settings: another request gets other folders."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def _trained(request: Request, model: str, out: Path, bars: Bars) -> int | None:
    """The peak memory of finetuning; None if an interrupted comparison finished it before."""
    if (out / CONFIG_FILE).is_file():
        return None
    config = FinetuneConfig(
        model=model, out=str(out), data=request.train, steps=request.steps,
        batch_size=request.batch_size, seq_len=request.seq_len, report=False,
    )  # fmt: skip
    return finetune(config, resume=out.exists(), progress=bars).peak_memory_bytes


def _measured(
    request: Request, name: str, adapter: Path | None, title: str, bars: Bars
) -> tuple[Measured, list[str]]:
    """A model's figures, and the prompts."""
    opened = open_to_run(name, adapter=adapter, device=request.device)
    tokenizer = opened.tokenizer
    ids: Tensor = token_segments(request.held_out, tokenizer, request.seq_len, request.segments)
    prompts = [tokenizer.decode(row[:PROMPT_TOKENS]) for row in ids[:PROMPTS]]
    with PeakMemory(opened.device) as peak:
        model = opened.load()
        with bars(f"measuring {title}", "passes") as show:
            losses = segment_losses(
                model, ids,
                progress=lambda _, done, total: show(f"measuring {title}", done, total),
            )  # fmt: skip
            sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
            given = [generate((model, tokenizer), p, sampling, raw=True) for p in prompts]
    rate = sum(each.tokens for each in given) / sum(each.seconds for each in given)
    del model
    gc.collect()
    return Measured(losses, rate, peak.nbytes, [each.text for each in given]), prompts


def _dense_bytes(source: Any) -> int:
    return sum(math.prod(each.shape) * each.dtype.itemsize for each in source.stored.values())


def _read(found: dict[str, Any]) -> Method:
    after = found["after"]
    measured = {"before": Measured(**found["before"]), "after": after and Measured(**after)}
    return Method(**{**found, **measured})
