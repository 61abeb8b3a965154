"""A LLaMA of 65 billion parameters takes a training step in little memory, and says how much, how long, and what was planned.

    python examples/benchmarks/llama65b.py                                    # 65B, quip-sharp-e8 at 2 bits, 128 tokens
    python examples/benchmarks/llama65b.py --model 7b --seq-len 16            # quick
    python examples/benchmarks/llama65b.py --model 13b -q optq:bits=3 --mapped --folder checkpoints

The shapes are LLaMA's, the weights are random and packed, written straight to disk (:mod:`random_checkpoint`; resumable): 17 GB for 65B
in 2 bits. Then a process of its own (:mod:`llama_step`) loads them, puts a LoRA of rank 8 on every linear layer, and makes one step:
forward, chunked loss, backward with gradient checkpointing, AdamW; then one greedy token. Beside the measured peak stands what
`modulora plan` says for the same run, and the paper's number (arXiv 2309.16119: batch 1, sequence 128).

The exit code is 1 if the loss isn't finite, or a gradient isn't finite or is zero.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_step
from llama_step import RANK, step_flags
from random_checkpoint import SHAPES, create_quantizer, write_checkpoint

from modulora_core.planner.fitting import MemoryPlan, plan

GB, GIB = 10**9, 2**30

PAPER_GB = {
    "ModuLoRA, 2 bits": {"7b": 3.2, "13b": 5.4, "30b": 11.4, "65b": 21.8},
    "QLoRA, 4 bits": {"7b": 5.2, "13b": 8.6, "30b": 19.5, "65b": 36.7},
    "LoRA, 16 bits": {"7b": 38.4, "13b": 73.9, "30b": 183.3, "65b": 360.4},
}
"""Memory of finetuning on MNLI, batch 1, sequence 128 (arXiv 2309.16119, the table of memory)."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--model", default="65b", choices=tuple(SHAPES), help="whose shapes (65b)")
    add("-q", "--quantizer", default="quip-sharp-e8", metavar="NAME[:OPTION=VALUE,...]", help="quip-sharp-e8, in 2 bits")  # fmt: skip
    add("--folder", type=Path, help="keep checkpoints there, and use those that are there already")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    step_flags(parser)
    flags = parser.parse_args(words)
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="llama-"))
    try:
        measured = run(flags, folder)
    finally:
        if flags.folder is None:
            shutil.rmtree(folder)
    print(report(flags, measured))
    if flags.json is not None:
        flags.json.write_text(json.dumps(measured, indent=2) + "\n")
    return (
        0
        if math.isfinite(measured["step"]["loss"]) and not measured["step"]["bad_gradients"]
        else 1
    )


def run(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write, step, plan."""
    name = f"{flags.model}-{flags.quantizer}".replace(":", "-").replace("=", "").replace(",", "-")
    checkpoint, started = folder / name, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    nbytes = write_checkpoint(
        flags.model,
        create_quantizer(flags.quantizer),
        checkpoint,
        progress=None if flags.quiet else _told,
    )
    writing = time.perf_counter() - started
    words = [llama_step.__file__, str(checkpoint), *_step_words(flags)]
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the step ended with exit code {done.returncode}")
    fields = (
        "model",
        "quantizer",
        "seq_len",
        "dtype",
        "device",
        "mapped",
        "gradient_checkpointing",
    )
    return {
        "request": {name: getattr(flags, name) for name in fields},
        "checkpoint_bytes": nbytes,
        "writing_seconds": writing,
        "step": json.loads(done.stdout),
        # last, so that the planner's memory does not count in the step
        "plan": _plan(flags, checkpoint).to_json(),
    }


def _told(done: int, total: int) -> None:
    if (before := done * 20 // total) != getattr(_told, "before", None):
        print(f"  writing: {done / GB:.1f} of {total / GB:.1f} GB", file=sys.stderr, flush=True)
        _told.before = before  # type: ignore[attr-defined]


def _plan(flags: argparse.Namespace, checkpoint: Path) -> MemoryPlan:
    """Plan the step that was run."""
    return plan(
        str(checkpoint), device="cuda" if flags.device.startswith("cuda") else "cpu", rank=RANK,
        dropout=0.0, seq_len=flags.seq_len, batch_size=1, grad_accum=1, steps=1,
        dtype=flags.dtype, gradient_checkpointing=flags.gradient_checkpointing,
        mapped=flags.mapped,
    )  # fmt: skip


def _step_words(flags: argparse.Namespace) -> list[str]:
    words = ["--seq-len", str(flags.seq_len), "--dtype", flags.dtype, "--device", flags.device]
    words += ["--mapped"] if flags.mapped else []
    words += [] if flags.gradient_checkpointing else ["--no-gradient-checkpointing"]
    return words + (["--quiet"] if flags.quiet else [])


def report(flags: argparse.Namespace, measured: dict[str, Any]) -> str:
    """Tables in Markdown."""
    step, plan = measured["step"], measured["plan"]
    held = "one block in memory at a time" if flags.mapped else "resident"
    lines = [
        f"## LLaMA {flags.model}, {flags.quantizer}: {plan['bits_per_weight']:.3f} bits per weight, {held}",
        "",
        f"1 × {flags.seq_len} tokens, LoRA of rank {RANK} on every linear layer ({step['trained'] / 1e6:.1f} million values), "
        f"{flags.dtype}, {flags.device}, {measured['checkpoint_bytes'] / GB:.2f} GB on disk",
        "",
        "| phase | seconds | of all threads | peak, GiB | anonymous | of mapped files |",
        "|-|-|-|-|-|-|",
    ]
    for name, phase in step["phases"].items():
        sizes = [
            phase[key] / GIB for key in ("peak_memory_bytes", "anonymous_bytes", "mapped_bytes")
        ]
        cells = [
            name,
            *(f"{phase[key]:.1f}" for key in ("seconds", "cpu_seconds")),
            *(f"{size:.2f}" for size in sizes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    bad = f"{len(step['bad_gradients'])} are not: {', '.join(step['bad_gradients'][:3])}" if step["bad_gradients"] else "all"  # fmt: skip
    lines += [
        "",
        f"A step took {step['seconds_of_step']:.0f} s: {_rate(flags, measured)}. Loss {step['loss']:.3f} (random logits of variance 1 have "
        f"{step['expected_loss']:.3f}). Gradients of {step['gradients']} matrices A and B, finite and not zero: {bad}.",
        "",
        *_plan_table(measured),
        "",
        *_paper_table(flags, measured),
    ]
    return "\n".join(lines)


def _rate(flags: argparse.Namespace, measured: dict[str, Any]) -> str:
    """What the products with packed weights come to: one in the forward, one in the backward, and one again under checkpointing, but for a
    block's last layer.
    """
    plan, step = measured["plan"], measured["step"]
    shape = SHAPES[flags.model]
    last = shape.intermediate / (
        4 * shape.hidden + 3 * shape.intermediate
    )  # of a block's weights, in down_proj
    weights = 8 * plan["packed_bytes"] / plan["bits_per_weight"]
    operations = 2 * weights * flags.seq_len * (3 - last if flags.gradient_checkpointing else 2)
    return f"{operations / 1e12:.2f}e12 operations with packed weights, {operations / step['seconds_of_step'] / 1e9:.1f}e9 a second"


def _plan_table(measured: dict[str, Any]) -> list[str]:
    items, planned = measured["plan"]["items"], measured["plan"]["training_bytes"]
    peak = measured["step"]["peak_memory_bytes"]
    lines = [f"| `modulora plan`, {measured['plan']['jobs']['training']['when']} | GiB |", "|-|-|"]
    lines += [
        f"| {name.replace('_', ' ')} | {nbytes / GIB:.2f} |" for name, nbytes in items.items()
    ]
    lines += [f"| planned | {planned / GIB:.2f} |", f"| measured | {peak / GIB:.2f} |"]
    return lines


def _paper_table(flags: argparse.Namespace, measured: dict[str, Any]) -> list[str]:
    step = measured["step"]
    peak, libraries = step["peak_memory_bytes"], step["phases"]["libraries"]["peak_memory_bytes"]
    lines = ["| GB | " + flags.model + " |", "|-|-|"]
    in_paper = {
        name: sizes[flags.model] for name, sizes in PAPER_GB.items() if flags.model in sizes
    }
    lines += [f"| {name} (the paper, on a GPU) | {size} |" for name, size in in_paper.items()]
    lines.append(f"| here, {flags.quantizer}, the whole process | {peak / GB:.2f} |")
    lines.append(
        f"| here, without what was resident before loading | {(peak - libraries) / GB:.2f} |"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
