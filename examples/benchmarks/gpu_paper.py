"""Predicts kernels and training on GPUs that are not here, from machine code and public figures.

    python examples/benchmarks/gpu_paper.py                 # all installed quantizers: minutes
    python examples/benchmarks/gpu_paper.py -q nf4 gguf:type=Q4_K --json paper.json

Needs triton, and no GPU. Each quantizer multiplies by weights of an 8 B model on a fake device,
which records the launches; they are compiled, and their instructions counted. A prediction is a
floor (:mod:`modulora_conformance.predicted`): no card was measured.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from modulora_conformance import ahead_of_time
from modulora_conformance.ahead_of_time import Call, compile_call
from modulora_conformance.fake_device import fake_cuda
from modulora_conformance.predicted import (
    CARDS,
    Card,
    Work,
    dense_seconds,
    named,
    per_thread,
    predicted_seconds,
    threads,
    waves,
    weights_of,
)

from modulora_core.registry import Choice
from modulora_core.spec import PackedWeight, Quantizer

SHAPES = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
"""The linear layers of a block of an 8 B Llama, ``(out, in)``, and how many there are."""

TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")
COUNTED = ("all", "integer", "float", "memory", "conversion")

BLOCKS, TOKENS = 32, 2 * 1024
LARGE = (14336, 4096)
SPECS = (
    "nf4", "optq:bits=4", "optq:bits=3", "int8", "fp4", "gguf:type=Q4_K", "gguf:type=Q6_K",
    "quip-sharp-e8", "qtip",
)  # fmt: skip


def products(
    quantizer: Quantizer, shape: tuple[int, int], rows: int, transpose: bool
) -> tuple[PackedWeight, Work]:
    """The work of a second product, which finds tables in their caches."""
    packed = quantizer.layout(shape).empty("cuda")
    x = torch.empty(rows, shape[0 if transpose else 1], dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        with Work() as work:
            quantizer.matmul(x, packed, transpose)
    return packed, work


def kernels(quantizer: Quantizer) -> Iterable[tuple[str, Call]]:
    """The kernels of a product of one row and of a tile, each once."""
    for title, rows in (("one row", 1), ("tile", TOKENS)):
        _, work = products(quantizer, LARGE, rows, False)
        seen = {call.kernel.__name__: call for call in work.calls if rows > 1 or weights_of(call)}
        for name, call in seen.items():
            yield (title if weights_of(call) else name.removesuffix("_kernel")), call


def cheapest(call: Call, target: str) -> Call:
    """The configuration with the fewest instructions, of those that the clock chooses from."""
    choices = call.choices() if len(call.configs) > 1 else [call]
    return min(choices, key=lambda each: total(each, target)["all"])


def total(call: Call, target: str) -> Counter[str]:
    """The instructions of all threads, by class."""
    found, all_threads = per_thread(call, compile_call(call, target)), threads(call)
    return Counter({name: n * all_threads * call.programs for name, n in found.items()})


def row_of(spec: str, title: str, call: Call, target: str) -> dict[str, Any]:
    """The facts of a kernel for a target: instructions for each weight, or number of a rotation."""
    call = cheapest(call, target)
    compiled, executed = compile_call(call, target), total(call, target)
    numbers = weights_of(call) or named(call)["out"].numel()
    card = next((card for card in CARDS.values() if card.target == target), None)
    by_class = [f"{executed[name] / numbers:.1f}" for name in COUNTED]
    return {
        "quantizer": spec, "kernel": title, "target": target, "registers": compiled.registers,
        "spills": compiled.spills, "shared": compiled.shared,
        "instructions": " ".join(by_class),
        "load bits": " ".join(f"{bits}×{n}" for bits, n in sorted(compiled.loads.items())),
        "programs": call.programs, "waves": f"{waves(call, compiled, card):.1f}" if card else "–",
    }  # fmt: skip


def predictions(spec: str, quantizer: Quantizer, card: Card) -> dict[str, Any]:
    """Linear layers of a step with gradient checkpointing, and of a token, beside dense bf16."""
    step: Counter[str] = Counter()
    for shape, count in SHAPES.items():
        for rows, transpose, times in ((TOKENS, False, 2), (TOKENS, True, 1), (1, False, 1)):
            packed, work = products(quantizer, shape, rows, transpose)
            title = "step" if rows > 1 else "token"
            step[title] += count * times * predicted_seconds(work, packed, card)
            step[f"dense {title}"] += count * times * dense_seconds(shape, rows, card)
        step["codes"] += count * packed.nbytes / card.bandwidth
        step["launches"] += count * work.launches
    return {
        "quantizer": spec, "step × dense": f"{step['step'] / step['dense step']:.2f}",
        "token × dense": f"{step['token'] / step['dense token']:.2f}",
        "% of bandwidth": f"{100 * step['codes'] / step['token']:.0f}",
        "ms a token": f"{1e3 * BLOCKS * step['token']:.2f}", "launches a block": step["launches"],
    }  # fmt: skip


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'-|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-q", "--quantizers", nargs="+", default=SPECS)
    parser.add_argument(
        "--targets", nargs="*", default=TARGETS, choices=list(ahead_of_time.TARGETS)
    )
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args(words)
    tables: dict[str, list[dict[str, Any]]] = {"kernels": [], **{name: [] for name in CARDS}}
    with fake_cuda(values=False):
        for spec in flags.quantizers:
            print(spec, "...", file=sys.stderr)
            quantizer = Choice.parse(spec).create()
            for title, call in kernels(quantizer):
                tables["kernels"] += [row_of(spec, title, call, each) for each in flags.targets]
            for name, card in CARDS.items():
                tables[name].append(predictions(spec, quantizer, card))
    show(f"Instructions a weight: {' '.join(COUNTED)}", tables["kernels"])
    for name in CARDS:
        show(f"Predicted for {name}", tables[name])
    if flags.json:
        flags.json.write_text(json.dumps(tables, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
