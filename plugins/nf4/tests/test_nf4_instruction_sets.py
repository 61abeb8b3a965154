"""The lookup is spelled for AVX-512, for AVX2 and for everything else; all three give the same bits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

numba = pytest.importorskip("numba")

DECODE = """
import torch
from modulora_nf4 import packing, reference
from modulora_nf4.quantizer import NF4, Options

for block_size in (2, 8, 64):
    packed = NF4(Options(block_size=block_size)).pack(torch.randn(37, 131, generator=torch.Generator().manual_seed(0)))
    q = packing.unpack(packed.tensors["codes"], 0, 37 * 131)
    whole = reference.dequantize(q, packed.tensors["absmax"], block_size).reshape(37, 131)
    for rows in [(0, 37), (1, 20), (36, 37)]:
        assert torch.equal(NF4().dequantize_tile(packed, rows, torch.float32), whole[slice(*rows)]), (block_size, rows)
"""

AVX2 = "+avx2,+avx,+fma,+bmi,+bmi2,+popcnt,+sse4.2,-avx512f"


def features() -> set[str]:
    """The processor's, as the kernel would name them."""
    from llvmlite import binding

    return {name for name, has in binding.get_host_cpu_features().items() if has}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")
@pytest.mark.parametrize(
    ("needs", "environment"),
    [
        ("avx512f", {}),
        ("avx2", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}),
        ("sse2", {"NUMBA_CPU_NAME": "generic"}),
    ],
    ids=["avx512", "avx2", "neither"],
)
def test_every_spelling_of_the_lookup_gives_the_bits_of_the_reference(
    needs: str, environment: dict[str, str]
) -> None:
    """If this fails: ``_sixteen_levels`` in cpu.py disagrees with ``reference.LEVELS`` for these processors."""
    if needs not in features():
        pytest.skip(f"this processor has no {needs}")
    done = subprocess.run(
        [sys.executable, "-c", DECODE], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
