"""Tensors that wait in a file: the same bits, out of the resident set, and the file is used again."""

from __future__ import annotations

import errno
import os
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modulora_core.errors import WorkError
from modulora_core.memory import PeakMemory
from modulora_core.offload import DiskFile, HostMemory, offload_place, offloaded_activations

MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool], ids=str)
def test_what_is_kept_is_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(5 * 777) % 7).to(dtype).view(5, 777).t()
    with DiskFile(tmp_path) as file:
        kept = file.keep(tensor)
        other = file.keep(tensor + tensor)
        assert torch.equal(kept, tensor)
        assert torch.equal(other, tensor + tensor)
        assert file.keep(kept) is kept, "what is there is there"
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_to_a_kept_tensor_stays(tmp_path: Path) -> None:
    with DiskFile(tmp_path) as file:
        kept = file.keep(torch.zeros(100_000))
        kept.add_(torch.arange(100_000))
        file.drop(kept)
        assert torch.equal(kept, torch.arange(100_000).float())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak")
def test_kept_tensors_are_not_in_memory(tmp_path: Path) -> None:
    with DiskFile(tmp_path) as file:
        kept: list[Tensor] = []
        with PeakMemory() as idle:
            pass
        with PeakMemory() as peak:
            for i in range(10):
                kept.append(file.keep(torch.full((20 * MIB // 4,), float(i))))
        grown = (peak.nbytes - idle.nbytes) / MIB
        assert grown < 80, f"200 MiB were kept in turns of 20, the peak grew by {grown:.0f} MiB"
        assert [float(tensor[-1]) for tensor in kept] == list(range(10))


def test_the_room_of_what_is_gone_is_used_again(tmp_path: Path) -> None:
    with DiskFile(tmp_path) as file:
        for _ in range(9):
            kept = [file.keep(torch.ones(MIB)) for _ in range(4)]
            del kept
        assert file.nbytes == 64 * MIB


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with DiskFile(tmp_path) as file, pytest.raises(WorkError, match="64 MiB beyond 0 MiB don't fit"):
        file.keep(torch.ones(100_000))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("kind", ["nowhere", "file", "memory"])
def test_gradients_are_the_same_bits_and_the_inputs_of_blocks_wait_elsewhere(
    tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(512, 256)  # 512 KiB
    model(x).square().mean().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    inputs: list[weakref.ref[Tensor]] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(weakref.ref(args[0])))
    with offload_place(torch.device("cpu"), tmp_path) as file:
        place = file if kind == "file" else HostMemory()
        with nullcontext() if kind == "nowhere" else offloaded_activations(model, place):
            y = model(x)
        # x is held by this test; the inputs of the other five blocks are what checkpointing keeps
        alive = sum(each() is not None for each in inputs)
        assert alive == (6 if kind == "nowhere" else 1)
        y.square().mean().backward()
        assert isinstance(file, DiskFile)
        assert (file.nbytes > 0) == (kind == "file")
    assert all(map(torch.equal, expected, (parameter.grad for parameter in model.parameters())))
