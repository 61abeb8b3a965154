"""Measures the peak memory of a whole model: loading, training an adapter, and decoding.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py -q quip-sharp-e8:bits=2 --peers bitsandbytes

Numbers are resident memory of processes, with interpreter and libraries; the column "libraries" is
the memory before loading. Each method trains in one process, for two steps, and decodes in
another. If a library cannot store its quantized model, loading includes quantizing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from decoding import DecodingJob
from methods import BASE, BASE_DTYPE, Method, ModelFiles
from models import model_files, model_flags, prepare_methods
from report import Result, Run, arguments, markdown
from training import TrainingJob, label, training_arguments, training_flags
from turns import NotMeasuredError

COLUMNS = ("libraries", "loading", "training", "decoding")


def measure(
    run: Run, files: ModelFiles, method: Method, dtype: str, training: tuple[Any, ...]
) -> Result:
    """The peaks of one method, without those that fail."""
    result: Result = {"method": method.name, "dtype": dtype}
    decoding = (run.flags.prompt, run.flags.length)
    for work, build, shared in (
        ("decoding", DecodingJob, decoding), ("training", TrainingJob, training),
    ):  # fmt: skip
        run.say(f"{method.name}, {dtype}, {work}")
        try:
            job = run.job(build, method, dtype, files, *shared)
            facts = job.ask("prepare")
            _, last = job.ask("turn")
            job.end()
        except NotMeasuredError as error:
            run.skip(method.name, str(error), f"{work}, {dtype}")
            continue
        result |= {key: facts[key] for key in ("libraries_bytes", "loading_bytes")}
        result[f"{work}_bytes"] = last["peak_memory_bytes"]
    return result


def with_ratios(results: list[Result]) -> list[Result]:
    """Each result with ``ratios`` to the dense model, by column."""
    base = next((r for r in results if label(r) == BASE), {})

    def ratios(result: Result) -> dict[str, float]:
        keys = [f"{column}_bytes" for column in COLUMNS]
        return {key: result[key] / base[key] for key in keys if key in result and base.get(key)}

    return [result | {"ratios": ratios(result)} for result in results]


def table(results: list[Result]) -> str:
    def cell(result: Result, column: str) -> str:
        key = f"{column}_bytes"
        if key not in result:
            return "–"
        ratio = result["ratios"].get(key)
        shown = "" if ratio is None or column == "libraries" else f" ({ratio:.2f})"
        return f"{result[key] / 2**20:.0f}{shown}"

    rows = ([r["method"], r["dtype"], *(cell(r, column) for column in COLUMNS)] for r in results)
    return markdown(["", "dtype", *COLUMNS], rows)


def panels(run: Run) -> dict[str, list[tuple[str, float]]]:
    bars: dict[str, list[tuple[str, float]]] = {}
    for r in run.results:
        for column in COLUMNS[1:]:
            if f"{column}_bytes" in r["ratios"]:
                bar = (label(r), r["ratios"][f"{column}_bytes"])
                bars.setdefault(f"peak, {column}", []).append(bar)
    return bars


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    training_flags(parser)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (16)")
    parser.add_argument("--length", type=int, default=16, help="tokens to decode (16)")
    flags = parser.parse_args(words)
    run = Run("memory", flags)
    training = training_arguments(run)
    with model_files(run) as files:
        prepare_methods(run, files)
        found = [
            measure(run, files, method, dtype, training)
            for dtype in flags.dtypes or [BASE_DTYPE]
            for method in run.methods.values()
        ]
    run.results += with_ratios([result for result in found if "loading_bytes" in result])
    batch, length = training[0]
    title = f"{flags.model}, MiB (× {BASE} {BASE_DTYPE}); training {batch} × {length} tokens"
    return run.finish([(title, table(run.results))], panels(run))


if __name__ == "__main__":
    sys.exit(main())
