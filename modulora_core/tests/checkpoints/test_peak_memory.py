import mmap
import sys

import pytest
import torch

from modulora_core.checkpoints.peak_memory import PeakMemory

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak")


def touch(mib):
    """Hold ``mib`` MiB of new resident memory for a moment."""
    # the heap may have as much resident memory that is free, after other tests
    torch.frombuffer(mmap.mmap(-1, mib * MIB), dtype=torch.uint8).fill_(1)


@linux
def test_a_peak_is_seen_though_the_memory_is_free_again():
    with PeakMemory() as idle:
        pass
    with PeakMemory() as peak:
        touch(200)
    grown = (peak.nbytes - idle.nbytes) / MIB
    assert 180 < grown < 300, f"200 MiB were touched, the peak grew by {grown:.0f} MiB"
