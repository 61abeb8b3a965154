"""Peak memory of a whole model: loading it, training its adapter, decoding with it; ours, dense, and other libraries.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py -q quip-sharp-e8:bits=2 --peers bitsandbytes --dtypes float32 bfloat16

Resident sets of processes, interpreter and libraries included; "libraries" is the resident set before loading. Each method trains in one
process (two steps) and decodes in another. What is loaded was quantized before, where the library can keep it; otherwise loading quantizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from decoding import DecodingJob
from methods import BASE, BASE_DTYPE, Method, ModelFiles
from models import model_files, model_flags, prepare_methods
from report import Bars, Result, Run, arguments, markdown
from training import TrainingJob, checkpointing_flag, checkpointing_methods, kept_products
from turns import NotMeasuredError

LOADING, TRAINING, DECODING, LIBRARIES = "loading_bytes", "training_bytes", "decoding_bytes", "libraries_bytes"  # fmt: skip
COLUMNS = {LIBRARIES: "libraries", LOADING: "loading", TRAINING: "training", DECODING: "decoding"}


def measure(run: Run, files: ModelFiles, method: Method, dtype: str) -> Result:
    """The peaks of one method. What it can't do is noted and left out."""
    flags, result = run.flags, {"method": method.name, "dtype": dtype}
    training = (flags.batch_size, flags.seq_len, checkpointing_methods(run), kept_products(run))
    jobs = {
        DECODING: (DecodingJob, (flags.prompt, flags.length)),
        TRAINING: (TrainingJob, training),
    }
    for what, (build, shared) in jobs.items():
        run.say(f"{method.name}, {dtype}, {COLUMNS[what]}")
        try:
            job = run.job(build, method, files, dtype, *shared)
            told: dict[str, Any] = job.ask("prepare")
            _, last = job.ask("turn")
            job.end()
        except NotMeasuredError as error:
            run.skip(method.name, str(error), f"{COLUMNS[what]}, {dtype}")
            continue
        result |= {
            LIBRARIES: told[LIBRARIES],
            LOADING: told[LOADING],
            what: last["peak_memory_bytes"],
        }
    return result


def with_ratios(results: list[Result]) -> list[Result]:
    """Each result with ``ratios`` to the dense one, by column."""
    base = next((r for r in results if (r["method"], r["dtype"]) == (BASE, BASE_DTYPE)), {})
    return [
        r | {"ratios": {c: r[c] / base[c] for c in COLUMNS if c in r and base.get(c)}}
        for r in results
    ]


def table(results: list[Result]) -> str:
    def cell(result: Result, column: str) -> str:
        if column not in result:
            return "–"
        ratio = result["ratios"].get(column)
        told = f"{result[column] / 2**20:.0f}"
        return told if ratio is None or column == LIBRARIES else f"{told} ({ratio:.2f})"

    heads = ["", "dtype", *COLUMNS.values()]
    return markdown(
        heads,
        [[r["method"], r["dtype"], *(cell(r, column) for column in COLUMNS)] for r in results],
    )


def panels(run: Run) -> dict[str, Bars]:
    return {
        f"peak, {name}": [(f"{r['method']}, {r['dtype']}", r["ratios"][column]) for r in run.results if column in r["ratios"]]
        for column, name in COLUMNS.items()
        if column != LIBRARIES and any(column in r["ratios"] for r in run.results)
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    model_flags(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=2, help="segments of a batch (2)")
    add("--seq-len", type=int, help="tokens of a segment (256)")
    checkpointing_flag(parser)
    add("--prompt", type=int, default=16, help="tokens of the prompt (16)")
    add("--length", type=int, default=16, help="tokens to decode (16)")
    flags = parser.parse_args(words)
    flags.seq_len = flags.seq_len or (32 if flags.quick else 256)
    run = Run("memory", flags)
    with model_files(run) as files:
        prepare_methods(run, files)
        found = [
            measure(run, files, method, dtype)
            for dtype in flags.dtypes or [BASE_DTYPE]
            for method in run.methods.values()
        ]
    run.results += with_ratios([result for result in found if LOADING in result])
    title = f"{flags.model}, peak MiB (× {BASE} {BASE_DTYPE}); training {flags.batch_size} × {flags.seq_len} tokens"
    return run.finish([(title, table(run.results))], lambda: panels(run))


if __name__ == "__main__":
    sys.exit(main())
