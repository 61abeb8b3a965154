"""The memory items of training, decoding and quantizing, at the peak of each.

Constants were measured on Linux x86-64 with Python 3.11, torch 2.13 for CPUs, transformers 5.24.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from modulora_core.calibration.states import SPILL_BYTES
from modulora_core.calibration.walk import PAUSED_BYTES
from modulora_core.models.config import vocabulary_of
from modulora_planner.byte_counts import Bytes
from modulora_planner.dense_weights import DenseWeights
from modulora_planner.model import PlannedModel
from modulora_planner.processes import divided
from modulora_planner.rehearsal import Rehearsal
from modulora_planner.request import PlanRequest

FP32 = 4
MIB = 2**20

RUNTIME = {"training": 715, "decoding": 548, "quantizing": 503, "calibrating": 578}
"""MiB of a process without a model, on a CPU: interpreter, libraries, thread stacks.

Measured beside the libraries of all extras: transformers imports some of them if they are there.
"""

GPU_RUNTIME = 600 * MIB
"""Bytes of CUDA's context and cuBLAS's workspace: an estimate."""

TRITON_BYTES = 70 * MIB
"""Bytes that an installed Triton adds: torch's compiler imports it, and transformers that."""

CUDA_BUILD_BYTES = 530 * MIB
"""Bytes that torch's build for CUDA adds to a process on a CPU: 450 to 616 MiB were measured."""

HEAP_BLOCK = 32 * MIB
"""The largest block that glibc takes from its heap. A larger one is a mapping of its own."""

HOLES_OF_A_BLOCK, HOLES_OF_A_PROMPT, HOLES_OF_LAYERS = 2, 6, 4
"""Holes in a CPU's heap: hidden states that fit into them, and H's after calibrated layers.

A block frees its temporaries around the tensors that stay. Measured: 0 to 2 hidden states a block
with gradient checkpointing, 0 to 5 without. Prompts left 6 to 8, calibrated layers 2 to 4 of H.
"""

GPU_CACHE = 0.05
"""The share of a step's tensors that torch's allocator holds beside them on a GPU: an estimate."""

STATES = {"adafactor": 0, "sgd": 0, "lomo": 0, "lion": 4, "rmsprop": 4, "adagrad": 4,
          "ademamix": 12}  # fmt: skip
"""Bytes of an optimizer's states for each value, by a part of its name. Others have AdamW's 8."""

MOMENTS = 4
"""H, its mean, and two triangles that make it (:mod:`modulora_core.calibration.moments`)."""

WEIGHING_LOGITS = 3
"""Copies of a sample's logits (:mod:`modulora_core.calibration.sensitivity`)."""

ITEMS: Mapping[str, str] = {
    "packed_codes": "packed weights: codes",
    "packed_scales": "packed weights: scales and vectors",
    "embeddings_and_head": "embeddings and head",
    "norms_and_biases": "norms, biases and other dense weights",
    "gathered": "weights gathered from other processes",
    "adapter": "LoRA weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "workspace": "workspace of products and packing",
    "loss": "logits and loss",
    "kv_cache": "KV cache",
    "dense_weights": "dense weights of linear layers",
    "calibration": "hidden states and second moments",
    "allocator": "reserved by the allocator, unused",
    "runtime": "interpreter, libraries, runtime",
}
"""The items in the order of tables and pictures, with their titles."""

_WHEN = {
    "forward": "the forward ends",
    "loss": "the loss is computed",
    "backward": "a block's backward runs",
    "optimizer": "the optimizer steps",
}


@dataclass(frozen=True, slots=True)
class Job:
    """The peak of a job.

    Attributes:
        when: the work at the peak.
        items: bytes by the names of :data:`ITEMS`, from 1 KiB on.
    """

    when: str
    items: Mapping[str, int]

    @classmethod
    def of(cls, when: str, items: Mapping[str, float]) -> Job:
        """Make a job of its items, sorted and rounded."""
        return cls(when, {n: round(items[n]) for n in ITEMS if items.get(n, 0) >= 2**10})

    @property
    def nbytes(self) -> int:
        return sum(self.items.values())

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.nbytes, "when": self.when, "items": dict(self.items)}


def training(packed: PlannedModel, request: PlanRequest, rehearsal: Rehearsal) -> Job:
    """Plan the training step with the highest peak; ``rehearsal`` is of its forward and backward.

    After the first step the optimizer has its states.
    """
    adapter, largest = FP32 * sum(rehearsal.trained), FP32 * max(rehearsal.trained)
    states = _states(sum(rehearsal.trained), request)
    at, moving = rehearsal.peak()
    moving["optimizer"] = 0 if request.config.steps == 1 else states
    # torch's AdamW copies one parameter after the other on a CPU, all of them on a GPU
    copies = 2 * (largest if request.device == "cpu" else adapter)
    step = Bytes(gradients=adapter, workspace=copies, optimizer=states)
    if step.total() > moving.total():
        at, moving = "optimizer", step
    if request.config.grad_accum > 1:  # the gradients of the batches before stay
        moving["gradients"] = adapter
    hidden = _on_heap(packed, request, request.config.batch_size)
    holes = HOLES_OF_A_BLOCK * len(rehearsal.kinds) * hidden
    process = _process("training", request.device, moving.total(), holes)
    items = {**loaded(packed, request), "adapter": adapter, **moving, **process}
    when = _WHEN.get(at.partition(" ")[0], "a step begins")
    return Job.of(when, divided(items, packed, request))


def decoding(packed: PlannedModel, request: PlanRequest, rehearsal: Rehearsal) -> Job:
    """Plan one answer in a context of ``seq_len`` tokens, by the rehearsal of its prompt."""
    _, moving = rehearsal.peak()
    holes = HOLES_OF_A_PROMPT * _on_heap(packed, request, 1)
    process = _process("decoding", request.device, moving.total(), holes)
    moving["activations"] -= min(rehearsal.cache, moving["activations"])
    moving["kv_cache"] = rehearsal.cache
    return Job.of("the prompt is read", {**loaded(packed, request), **moving, **process})


def quantizing(packed: PlannedModel, request: PlanRequest) -> Job:
    """Plan ``modulora quantize`` on a CPU.

    It holds one parameter at a time, or with calibration one decoder block. With calibration this
    is an estimate: the part of a block that waits between two layers depends on the model.
    """
    calibrated = any(q.spec.calibration == "required" for q in packed.quantizers)
    items = _by_block(packed, request) if calibrated else _by_parameter(packed)
    return Job.of("tokens are weighed" if "loss" in items else "a layer is packed", items)


def loaded(packed: PlannedModel, request: PlanRequest) -> Mapping[str, int]:
    """Bytes of all weights in memory, by item. A mapped model holds one block of packed weights."""
    ends, others = _dense(packed, getattr(torch, request.dtype))
    blocks: dict[str, Bytes] = {"": Bytes()}
    for name, site in packed.record.items():
        block = packed.block_of(name) if request.config.mapped else ""
        items = blocks.setdefault(block, Bytes())
        for tensor in site.layout.tensors.values():
            item = "packed_scales" if "float" in tensor.dtype else "packed_codes"
            if isinstance(packed.quantizers[site.recipe], DenseWeights):
                item = "dense_weights"
            items[item] += tensor.nbytes * (site.experts or 1)
    outside = blocks.pop("")
    largest = max(blocks.values(), key=Bytes.total, default=Bytes())
    return {**(outside + largest), "embeddings_and_head": ends, "norms_and_biases": others}


@lru_cache(maxsize=8)
def _dense(packed: PlannedModel, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the dense embeddings and head, and of other dense parameters, in ``dtype``."""
    model = packed.dense.outline(dtype)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if name not in packed.record.weights:
            module = model.get_submodule(name.rpartition(".")[0])
            is_end = module in ends or isinstance(module, nn.Embedding)
            sizes[is_end] += parameter.numel() * parameter.element_size()
    return sizes[True], sizes[False]


def _states(values: int, request: PlanRequest) -> int:
    """Bytes of the optimizer's states."""
    name = request.config.optim
    if name.startswith("paged") and request.device == "cuda":
        return 0  # a full GPU leaves them in the CPU's memory
    nbytes = next((n for part, n in STATES.items() if part in name), 2 * FP32)
    if "8bit" not in name:
        return values * nbytes
    # 256 values share a scale in fp32 (Dettmers et al. 2021, arXiv 2110.02861)
    return round(values * nbytes / FP32 * (1 + FP32 / 256))


def _on_heap(packed: PlannedModel, request: PlanRequest, batch_size: int) -> int:
    """Bytes of a hidden state if it is on a CPU's heap, else 0."""
    width = getattr(torch, request.dtype).itemsize
    hidden = packed.dense.config.get_text_config().hidden_size
    nbytes = int(batch_size * request.config.seq_len * hidden * width)
    return nbytes if nbytes <= HEAP_BLOCK else 0


def _process(job: str, device: str, moving: int = 0, holes: int = 0) -> dict[str, float]:
    """Bytes of the process without a model, and bytes that the allocator holds unused.

    Args:
        moving: bytes of the tensors at the peak.
        holes: bytes of the holes in a CPU's heap. With MALLOC_MMAP_THRESHOLD_=131072 each tensor
            is a mapping, and there are none.
    """
    if device != "cpu":
        return {"allocator": GPU_CACHE * moving, "runtime": GPU_RUNTIME}
    runtime = RUNTIME[job] * MIB
    runtime += TRITON_BYTES if importlib.util.find_spec("triton") is not None else 0
    runtime += CUDA_BUILD_BYTES if torch.version.cuda is not None else 0
    return {"allocator": holes, "runtime": runtime}


def _by_parameter(packed: PlannedModel) -> dict[str, float]:
    """The largest parameter and its packed weight, or two parameters while one is read."""
    outline, width = packed.dense.outline(), packed.dense.stored_dtype.itemsize
    sizes = [p.numel() * p.element_size() for p in outline.parameters()]
    pair = max(map(sum, pairwise(sizes)), default=sum(sizes))
    found: list[dict[str, float]] = [{"dense_weights": pair}]
    for site in packed.record.sites:
        # one expert at a time; a weight in fp32 needs no copy
        units = packed.quantizers[site.recipe].spec.packing_memory - (width == FP32)
        peak = max(site.layout.nbytes, units * FP32 * math.prod(site.layout.shape))
        workspace = site.nbytes - site.layout.nbytes + peak
        found.append({"dense_weights": site.numel * width, "workspace": workspace})
    return max(found, key=lambda items: sum(items.values())) | _process("quantizing", "cpu")


def _end_sizes(packed: PlannedModel) -> tuple[int, int]:
    """The weights of the embedding, and of a head that is not tied to it."""
    model = packed.dense.outline()
    table = {*model.get_input_embeddings().parameters()}
    head = {*model.get_output_embeddings().parameters()} - table
    return sum(p.numel() for p in table), sum(p.numel() for p in head)


def _by_block(packed: PlannedModel, request: PlanRequest) -> dict[str, float]:
    """A block in fp32, second moments and hidden states."""
    weights, shapes, solver = Bytes(), set(), 0.0
    for name, site in packed.record.items():
        if block := packed.block_of(name):
            weights[block] += site.numel
            shapes.add(site.layout.shape)
            out, width = site.layout.shape
            units = packed.quantizers[site.recipe].spec.packing_memory
            solver = max(solver, units * (out * width + width**2))
    samples = math.ceil(request.calibration_samples / request.processes)
    tokens = samples * request.calibration_seq_len
    hidden, widest = packed.dense.config.get_text_config().hidden_size, max(w for _, w in shapes)
    states = FP32 * tokens * hidden
    kept = 0 if states > SPILL_BYTES else states
    dense, moment = FP32 * max(weights.values()), FP32 * widest**2
    packing: dict[str, float] = {
        "dense_weights": dense,
        "workspace": FP32 * solver,
        "activations": min(PAUSED_BYTES, FP32 * tokens * (2 * hidden + widest)),
        "calibration": kept + MOMENTS * moment,
    }
    # the embedding stays until all samples have come through it
    table, head = _end_sizes(packed)
    entering: dict[str, float] = {"dense_weights": dense + FP32 * table, "calibration": kept}
    # one sample's logits, their probabilities, and the sums of these
    logits = request.calibration_seq_len * vocabulary_of(packed.dense.config)
    weighing: dict[str, float] = {
        "embeddings_and_head": FP32 * (table + head),
        "loss": WEIGHING_LOGITS * FP32 * logits,
    }
    items = max(packing, entering, weighing, key=lambda items: sum(items.values()))
    return items | _process("calibrating", "cpu", 0, HOLES_OF_LAYERS * min(moment, HEAP_BLOCK))
