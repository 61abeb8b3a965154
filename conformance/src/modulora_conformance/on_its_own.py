"""What a quantizer does in a process of its own::

    python -m modulora_conformance.on_its_own works NAME OPTIONS     without numba; prints the warnings, and the shapes of results
    python -m modulora_conformance.on_its_own packs NAME OPTIONS [--without-numba]     prints the memory that packing takes

OPTIONS is JSON, and so is what is printed.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from modulora_conformance.cases import fit, gaussian, pack
from modulora_core.registry import create
from modulora_core.spec import Quantizer

SIDE = 4096
"""Of the square weight that is packed: 64 MiB in fp32, much more than anything else that packing takes."""


def _works(quantizer: Quantizer) -> dict[str, Any]:
    out_features, in_features = shape = fit(quantizer, 20, 70)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        packed = pack(quantizer, gaussian(shape, 0))
        results = {
            "tile": quantizer.dequantize_tile(packed, (3, out_features), torch.bfloat16),
            "product": quantizer.matmul(torch.ones(2, in_features), packed),
            "transposed": quantizer.matmul(torch.ones(2, out_features), packed, True),
        }
    shapes = {name: list(tensor.shape) for name, tensor in results.items()}
    return {
        "warnings": [str(warning.message) for warning in caught],
        "shape": list(shape),
        "shapes": shapes,
    }


def _packs(quantizer: Quantizer) -> dict[str, Any]:
    pack(quantizer, gaussian((512, 512), 0))  # what is loaded once is not the weight's
    weight = torch.empty(SIDE, SIDE, dtype=torch.bfloat16).normal_().t()
    before = _peak()
    pack(quantizer, weight)
    return {
        "share": (_peak() - before) / (4 * weight.numel()) + 0.5
    }  # the weight itself is half as large as in fp32


def _peak() -> int:
    """The largest resident size so far, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    job, name, options, *without = sys.argv[1:]
    if without or job == "works":
        sys.modules["numba"] = None  # type: ignore[assignment]  # importing it raises ImportError
    if job == "packs":
        warnings.simplefilter("ignore")
    print(json.dumps((_works if job == "works" else _packs)(create(name, json.loads(options)))))
