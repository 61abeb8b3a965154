"""Write a comparison of quantizers as one HTML page that needs no other file and no script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from modulora_compare.comparison.measure import (
    ANSWER_TOKENS,
    LEAST_SEGMENTS,
    Measured,
    Method,
    Request,
    difference,
)
from modulora_compare.report.curves import Curve
from modulora_compare.report.page import template
from modulora_core.version import VERSION

HEADS = ("", "MiB", "perplexity", "nats above original", "finetuned", "nats above original",
         "tokens/s", "peak GiB")  # fmt: skip

MEANING = (
    "Nats above original: the mean loss of a token, minus the original's in the same column. If "
    "the original cannot be finetuned, its loss before finetuning is subtracted in both columns."
)
MANY = (
    "In brackets its 95 % interval, by bootstrap over the segments. An interval without 0 is a "
    "difference on this text."
)
FEW = (
    f"So few segments say nothing about which is better: from {LEAST_SEGMENTS} on, an interval is "
    "beside the mean (--segments)."
)


def page(request: Request, methods: Sequence[Method], command: str) -> str:
    """The text of the page. ``command`` repeats the comparison."""
    heads = HEADS if request.steps else (*HEADS[:4], *HEADS[6:])
    finetuned = f", then finetuned for {request.steps} steps at batch size {request.batch_size}"
    few = len(methods[0].before.losses) < LEAST_SEGMENTS
    table = f" The embedding is packed with {request.embeddings}." if request.embeddings else ""
    return template(Path(__file__).with_name("comparison.html.jinja")).render(
        title=f"Quantizers of {request.model}",
        subtitle=f"Perplexity of {len(methods[0].before.losses)} segments of {request.seq_len} "
        f"tokens of {request.held_out}{finetuned if request.steps else ''}.{table}",
        curve=_curve(methods),
        heads=heads,
        rows=[list(_row(each, methods[0], request.steps)) for each in methods],
        meaning=f"{MEANING} {FEW if few else MANY}",
        samples=list(_samples(methods)),
        longest=ANSWER_TOKENS,
        command=command,
        version=VERSION,
    )


def _curve(methods: Sequence[Method]) -> Curve:
    ordered = sorted(methods, key=lambda each: each.nbytes)
    series = {
        "quantized": [(round(each.nbytes / 2**20), each.before.perplexity) for each in ordered]
    }
    after = [(round(each.nbytes / 2**20), each.after.perplexity) for each in ordered if each.after]
    if after:
        series["finetuned"] = after
    names = [each.name for each in ordered]
    return Curve("Perplexity by MiB", series, labels=names, axis="MiB", joined=False)


def _row(method: Method, base: Method, steps: int) -> Iterator[str]:
    yield method.name
    yield f"{method.nbytes / 2**20:,.0f}"
    yield f"{method.before.perplexity:.2f}"
    yield _beside(method.before, base.before)
    if steps:
        yield "–" if method.after is None else f"{method.after.perplexity:.2f}"
        yield "–" if method.after is None else _beside(method.after, base.after or base.before)
    yield f"{method.before.tokens_per_second:.1f}"
    peaks = [method.before.peak_memory_bytes, method.training_peak_bytes or 0]
    yield f"{max(peaks) / 2**30:.2f}"


def _beside(measured: Measured, base: Measured) -> str:
    if measured.losses == base.losses:
        return ""
    mean, low, high = difference(measured.losses, base.losses)
    if len(base.losses) < LEAST_SEGMENTS:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _samples(methods: Sequence[Method]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    for i, prompt in enumerate(methods[0].prompts):
        answers = []
        for each in methods:
            answers.append((each.name, each.before.answers[i]))
            if each.after is not None:
                answers.append((f"{each.name}, finetuned", each.after.answers[i]))
        yield prompt, answers
