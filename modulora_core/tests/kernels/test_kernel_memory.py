"""What kernels change in how memory is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytest.importorskip("numba")

TILES = """
import resource
import torch
from modulora_core import kernels

def step():
    activations = torch.ones(3 * 2**20), torch.ones(3 * 2**20)
    tile = kernels.filled_tile(lambda start, stop, out: out.fill_(1), (0, 2048), 2048, torch.float32)

kernels.launch(lambda out: None, torch.empty(1))
for _ in range(10):  # until every size has its place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")
def test_the_memory_of_a_tile_is_kept_for_the_next_one() -> None:
    """If this fails: each tile is faulted in anew, 4096 pages of it, beside activations that come and go, 24 MiB here."""
    done = subprocess.run(
        [sys.executable, "-c", TILES], capture_output=True, text=True, timeout=120
    )
    assert int(done.stdout) < 4096, done.stderr
