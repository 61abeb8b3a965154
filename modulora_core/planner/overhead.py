"""What a process takes without any model, and what memory it gets and doesn't use: measured constants.

On a CPU (Linux x86-64, Python 3.11, torch 2.13 built for CPUs, transformers 5.24): the resident set of ``modulora finetune`` after a step,
less the model. Interpreter and libraries, their code that a step touches, the compiler of kernels, thread stacks. docs/planning.md has
the command.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

MIB = 2**20

TRAINING_BYTES = {"cpu": 658 * MIB, "cuda": 600 * MIB}
"""Of a process that trains: on a CPU between what fp32 (634 MiB) and bf16 runs of test_plan_truth.py took beside Triton.
On a GPU: CUDA's context and cuBLAS's workspace, an estimate."""

RUNNING_BYTES = {"cpu": 470 * MIB, "cuda": 600 * MIB}
"""Of a process that generates."""

QUANTIZING_BYTES = {"cpu": 470 * MIB, "cuda": 600 * MIB}
"""Of a process that quantizes without calibration."""

CALIBRATING_BYTES = {"cpu": 510 * MIB, "cuda": 600 * MIB}
"""Of one that quantizes with it: it tokenizes a text, and runs blocks."""

TRITON_BYTES = 70 * MIB
"""What Triton takes more of a process on a CPU, where it is installed: torch's compiler imports it, which transformers imports."""

CUDA_BUILD_BYTES = 530 * MIB
"""What torch's build for CUDA takes more of a process on a CPU, by its libraries: from 450 to 616 MiB with torch 2.15 for CUDA 13.2, by
what of their files the system has in its cache: one touch brings as much into a process as is there in one piece."""

HEAP_BLOCK = 32 * MIB
"""The largest block that glibc may take from its heap; larger ones are mappings of their own, which the system gets back."""

STEPS, FORWARDS, LAYERS = 8, 2, 4
"""Tensors of the largest size that fit into the heap's holes after some training steps (4 to 11 were measured), after forwards that keep
nothing (1 to 4), and after layers were calibrated and packed (2 to 4)."""

_CACHED = 0.05
"""Share of a step's tensors that torch's allocator on a GPU holds beside them: an estimate."""


def of_process(measured: Mapping[str, int], device: str) -> int:
    """What a process takes without a model, of one of the kinds above, with the libraries that are installed here."""
    if device != "cpu":
        return measured[device]
    with_triton = importlib.util.find_spec("triton") is not None
    with_cuda = torch.version.cuda is not None
    return measured[device] + with_triton * TRITON_BYTES + with_cuda * CUDA_BUILD_BYTES


def unused(device: str, moving: int, largest: int, holes: int) -> float:
    """Bytes that the allocator holds beside the tensors of a step.

    On a CPU it is the heap's holes. With ``MALLOC_MMAP_THRESHOLD_=131072`` in the environment every tensor is a mapping and there are none;
    ``MALLOC_ARENA_MAX`` changes nothing.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        moving: bytes of the tensors at the peak.
        largest: bytes of the largest of them that comes from the heap.
        holes: :data:`STEPS`, :data:`FORWARDS` or :data:`LAYERS`.
    """
    return holes * largest if device == "cpu" else _CACHED * moving
