"""Compares quantizers by perplexity on held-out text, and by the time and memory of quantizing.

    python examples/benchmarks/quality.py -q nf4 optq:bits=3 quip-sharp-e8 --peers hqq gptqmodel
    python examples/benchmarks/quality.py -q quip-sharp-e8 --tune-epochs 4 --peers
    python examples/benchmarks/quality.py -q optq:bits=3 --peers --uncalibrated \\
        optq:bits=3,act_order=false,range_search=false,static_groups=false

All methods start from one fp32 folder and, if they calibrate, from the same token ids. The same
code evaluates all of them in fp32. Bits per weight count all tensors of the linear layers. A
process of its own writes each quantized model; seconds and peak are this process's. Both are
missing if the model is in --folder already, or if the library quantizes while loading.

A second text, 300 articles of Australian news, is in the package gensim:

    pip download --no-deps gensim==4.4.0
    python -m zipfile -e gensim-4.4.0-*.whl gensim-files
    cp gensim-files/gensim/test/test_data/lee_background.cor news.txt
    python examples/benchmarks/quality.py --data 'pydoc[80%:]' news.txt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from methods import BASE_DTYPE, Method, Packed
from models import ModelJob, model_files, model_flags, nbytes, prepare_methods
from report import Run, arguments, markdown
from transformers import AutoTokenizer
from turns import NotMeasuredError
from typing_extensions import override

from modulora_core.data import token_segments
from modulora_core.inference.evaluate import perplexity


@dataclass(frozen=True)
class Uncalibrated(Packed):
    """Packs each layer by itself, with H = I: round to nearest, for most quantizers."""

    @property
    @override
    def name(self) -> str:
        return f"{self.words}, H = I"

    prepare, load = Method.prepare, Method.load


class QualityJob(ModelJob):
    """A model to evaluate."""

    def measure(self, data: Sequence[str], seq_len: int, segments: int) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(self.files.dense)
        found = {}
        for source in data:
            ids = token_segments(source, tokenizer, seq_len, segments)
            found[source] = perplexity(self.model, ids, batch_size=4).perplexity
        stored = sum(nbytes(self.model.get_submodule(path)) for path in self.layers)
        bits = 8 * stored / sum(self.layers.values())
        return {"perplexity": found, "bits_per_weight": bits}


def table(run: Run) -> str:
    def text(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    data = run.flags.data
    heads = ["", "bits per weight", "seconds", "peak MiB", *(f"perplexity, {d}" for d in data)]
    rows = []
    for r in run.results:
        peak = r.get("quantizing_bytes")
        figures = [text(r["bits_per_weight"], 2), text(r.get("quantizing_seconds"), 1)]
        figures += [text(peak and peak / 2**20, 0)]
        rows.append([r["method"], *figures, *(text(r["perplexity"][name], 2) for name in data)])
    return markdown(heads, rows)


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    add = parser.add_argument
    add("--uncalibrated", nargs="+", default=[], metavar="NAME[:OPTION=VALUE,...]",
        help="quantizers of ours to measure with H = I")  # fmt: skip
    add("--calibration", default="pydoc[:80%]", metavar="SOURCE")
    add("--tune-epochs", type=int, default=0, help="of our calibrated quantizers")
    add("--data", nargs="+", default=["pydoc[80%:]"], metavar="SOURCE", help="held-out texts")
    add("--seq-len", type=int, help="tokens of a held-out segment")
    add("--segments", type=int, help="the most segments of a text")
    flags = parser.parse_args(words)
    flags.samples = flags.samples or (4 if flags.quick else 32)
    flags.sample_len = flags.sample_len or (64 if flags.quick else 512)
    seq_len = flags.seq_len or flags.sample_len
    segments = flags.segments or (4 if flags.quick else 32)
    run = Run("quality", flags)
    run.methods |= {method.name: method for method in map(Uncalibrated, flags.uncalibrated)}
    with model_files(run, flags.calibration, flags.tune_epochs) as files:
        facts = prepare_methods(run, files)
        for name, method in run.methods.items():
            run.say(f"evaluating {name}")
            try:
                job = run.job(QualityJob, method, BASE_DTYPE, files)
                found = job.ask("measure", flags.data, seq_len, segments)
                job.end()
            except NotMeasuredError as error:
                run.skip(name, str(error))
                continue
            run.results.append({"method": name, **facts.get(name, {}), **found})
    first = flags.data[0]
    bars = {f"perplexity, {first}": [(r["method"], r["perplexity"][first]) for r in run.results]}
    return run.finish([(flags.model, table(run))], bars)


if __name__ == "__main__":
    sys.exit(main())
