"""Up to how many rows a quantizer's fused product is faster than one over decoded tiles: what ``FEW_ROWS`` of its module should be.

Blocks of sums, which are fused too, are beside them where a product may be made of them, and those that AMX makes where there is that: from
how many rows on, and up to how many.

    python examples/benchmarks/few_rows.py
    python examples/benchmarks/few_rows.py -q nf4 optq:bits=3 --rows 16 24 32 48 --seconds 2

The ways of our quantizers take turns with the dense fp32 product, in one process, over more weights than the last cache holds; the
table has × dense, of the medians. A module's ``FEW_ROWS`` is set to more and to none for it, as is what says when blocks are taken;
quantizers that have none are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from unittest.mock import patch

import torch
from layer import shape_of
from methods import Packed, promised
from modulora_conformance.bench.timing import Timing, cold_copies, in_turns, rotating
from report import describe, environment, markdown
from torch import Tensor

from modulora_core.kernels import choices
from modulora_core.kernels.cpu import amx, cpu_kernels
from modulora_core.packed import PackedWeight
from modulora_core.spec import Calibration, Quantizer

WAYS = "fused", "blocks", "amx", "tiles"


def packed_copies(quantizer: Quantizer, weight: Tensor) -> list[PackedWeight]:
    """As many as come from memory when they take turns. What wants calibration gets the identity for H."""
    seen = (
        None if quantizer.spec.calibration == "none" else Calibration(torch.eye(weight.shape[1]), 1)
    )
    packed = quantizer.pack(weight, seen)
    return [
        packed.layout.fill({name: tensor.clone() for name, tensor in packed.tensors.items()})
        for _ in range(cold_copies(packed.nbytes))
    ]


def compare(
    quantizer: Quantizer, packed: list[PackedWeight], dense: list[Tensor], x: Tensor, seconds: float, *, transpose: bool
) -> dict[str, Timing]:  # fmt: skip
    """The ways and ``dense``, in turns; ``amx`` where the processor has it."""
    has_amx = amx.available()

    def product(
        most: int, blocks: bool = False, by_amx: bool = False
    ) -> Callable[[PackedWeight], Tensor]:
        def multiply(weight: PackedWeight) -> Tensor:
            choices.FEW_ROWS, cpu_kernels.blocks_are_faster, amx.available = (
                most,
                lambda: blocks,
                lambda: by_amx,
            )
            return quantizer.matmul(x, weight, transpose)

        return multiply

    calls = {
        "fused": rotating(product(len(x)), packed),
        "blocks": rotating(product(0, blocks=True), packed),
        **({"amx": rotating(product(0, by_amx=True), packed)} if has_amx else {}),
        "tiles": rotating(product(0), packed),
        "dense": rotating(lambda weight: x @ (weight if transpose else weight.t()), dense),
    }
    with ExitStack() as stack, torch.no_grad():
        for owner, name, value in (
            (choices, "FEW_ROWS", choices.FEW_ROWS),
            (cpu_kernels, "blocks_are_faster", cpu_kernels.blocks_are_faster),
            (amx, "available", amx.available),
            (choices, "LEAST_ROWS_OF_SLICES", {2: 1, 3: 1}),
            (choices, "LEAST_FOR_AMX", 0),
            (choices, "LEAST_ROWS", 1),
            (choices, "MOST_ROWS", 2 * len(x)),  # half of it is for a small weight
        ):
            stack.enter_context(patch.object(owner, name, value))  # as it was, afterwards
        return in_turns(calls, seconds=seconds)


def measured(words: str, dense: list[Tensor], flags: argparse.Namespace) -> Iterator[Sequence[str]]:
    """The table's rows of one quantizer."""
    method = Packed(words)
    if (why := method.missing()) is not None:
        print(f"{words}: not measured: {why}", file=sys.stderr)
        return
    quantizer: Quantizer = method.quantizer()
    packed = packed_copies(quantizer, dense[0])
    for n in flags.rows:
        cells = [words, str(n)]
        for transpose in (False, True):
            x = torch.randn(n, dense[0].shape[0 if transpose else 1])
            times = compare(quantizer, packed, dense, x, flags.seconds, transpose=transpose)
            cells += [
                f"{times[way].beside(times['dense']):.2f}" if way in times else "–" for way in WAYS
            ]
        yield cells


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-q", "--quantizers", nargs="*", metavar="NAME[:OPTION=VALUE,...]",
        help="by default all that are installed, in all configurations that they promise")  # fmt: skip
    add("--rows", type=int, nargs="+", default=[16, 24, 32, 48], help="of the inputs")
    add("--shape", metavar="OUTxIN", help="of the weight (2048x2048)")
    add("--seconds", type=float, default=1.0, help="for each comparison")
    flags = parser.parse_args(words)
    shape = shape_of(flags.shape, 2048)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    dense = [weight, *(weight.clone() for _ in range(cold_copies(weight.nbytes) - 1))]
    rows = [row for q in flags.quantizers or promised() for row in measured(q, dense, flags)]
    print(f"few_rows: {describe(environment(None))}\n\n× dense fp32, {shape[0]} × {shape[1]}\n")
    print(markdown(["", "rows", *WAYS, *(f"transposed, {way}" for way in WAYS)], rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
