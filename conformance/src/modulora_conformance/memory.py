"""L5: memory.

No dense weight outlives a tile: that is what lets a model be finetuned that doesn't fit. Peaks are counted above the packed weight and
what the caller holds. Memory that a compiled kernel allocates for itself is not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import inputs, packed
from modulora_conformance.changes import clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.footprint import (
    Footprint,
    cuda_footprint,
    python_footprint,
    tensor_footprint,
)
from modulora_conformance.measurements import Measurements
from modulora_conformance.problems import SCALE, Problem, output, problem
from modulora_conformance.results import HARDWARE
from modulora_core.autograd import lora_linear
from modulora_core.kernels import one_thread
from modulora_core.spec import PackedWeight, Quantizer
from modulora_core.tiles import tile_budget

GRADIENTS = "test_output_and_gradients_equal_those_of_the_dense_layer"

SHAPE = (512, 512)
"""Dense in fp32: 1 MiB, 64 tiles. Powers of two, which every quantizer packs fast."""

TILE = 16 * 2**10

ROWS = {"few rows": 2, "many rows": 34}
"""Kernels for few rows commonly end at 32."""

STEPS = 50

Measure = Callable[[list[Tensor]], AbstractContextManager[Footprint]]

MEASURES: dict[str, Measure] = {
    "tensors": tensor_footprint,
    "objects and arrays": lambda _: python_footprint(),
}


class Memory(Level):
    level, title = "L5", "memory"

    @needs(GRADIENTS)
    def test_autograd_saves_no_weight(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: the result of ``matmul`` is a view of a much larger tensor, which autograd then keeps whole until the
        backward. Return a tensor of its own.
        """
        quantizer, weight = _packed(quantizer)
        given = problem(weight.shape, torch.float32, rows=(ROWS["few rows"],))
        leaves = given.leaves()
        u, v = (torch.ones(n, requires_grad=True) for n in reversed(weight.shape))
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = lora_linear(
                leaves["x"], quantizer, weight, leaves["bias"], leaves["A"], leaves["B"], scale=SCALE,
                input_scale=u, output_scale=v,
            )  # fmt: skip
        for tensor in weight.tensors.values():
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        # x for dA and du, U = x Aᵀ [n, r] for dB, Z [n, out] for dv, and what trains: everything that the core's autograd.py names
        rank = leaves["A"].shape[0]
        needed = sum(_nbytes(tensor) for tensor in (leaves["x"], leaves["A"], leaves["B"], u, v, y))
        needed += len(given.x) * rank * 4
        measurements.at_most("saved for the backward", sum(saved.values()), needed, unit="bytes")

    @needs(GRADIENTS, "test_a_tile_takes_the_memory_of_a_tile")
    def test_peak_memory_is_tiles_and_activations(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: ``matmul`` makes a dense weight, or a large part of one, instead of tiles within ``tiles.tile_bytes``; or
        unpacks all codes at once.
        """
        quantizer, weight = _packed(quantizer)
        for name, rows in ROWS.items():
            given = problem(weight.shape, torch.float32, rows=(rows,))
            with tensor_footprint([]):  # what is made once, such as compiled kernels, is there then
                _step(quantizer, weight, given)
            limit = _peak_limit(given)
            for (
                what,
                measure,
            ) in (
                MEASURES.items()
            ):  # a tile that is a numpy array is as good as one that is a tensor
                found = _forward_and_backward(quantizer, weight, given, measure)
                for which, used in zip(("forward", "backward"), found, strict=True):
                    measurements.at_most(f"{which}, {name}, {what}", used.peak, limit, unit="bytes")

    @needs(GRADIENTS, "test_the_tile_is_the_callers")
    def test_nothing_is_kept_after_a_call(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: a decoded weight, unpacked codes or a tile stay alive after ``matmul`` or ``dequantize_tile``: in a cache, in
        a module's variable, or in the quantizer, which all layers of a model share.
        """
        quantizer, weight = _packed(quantizer)
        rows = (0, weight.shape[0])
        given = problem(weight.shape, torch.float32, rows=(ROWS["few rows"],))
        _step(quantizer, weight, given)
        held = _held(quantizer)
        # a sixteenth of the dense weight: less than its codes at 4 bits; an index or a vector for each side is fine
        limit = _dense_bytes(weight) / 16
        for what, measure in MEASURES.items():
            another = clone(weight)  # what is kept by weight is made anew for it
            with measure([*another.tensors.values(), *given.tensors.values(), given.dY]) as found:
                _step(quantizer, another, given)
                _step(
                    quantizer,
                    another,
                    problem(weight.shape, torch.float32, rows=(ROWS["many rows"],)),
                )
                quantizer.dequantize_tile(another, rows, torch.float32)
            measurements.at_most(f"{what} kept", found.alive, limit, unit="bytes")
        measurements.at_most("kept in the quantizer", _held(quantizer) - held, limit, unit="bytes")

    @needs(GRADIENTS)
    def test_memory_does_not_grow_over_50_steps(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: each call leaves something behind: a list that is appended to, a cache without a bound, a reference from a
        result to its operands.
        """
        quantizer, weight = _packed(quantizer)
        given = problem(weight.shape, torch.float32, rows=(ROWS["few rows"],))
        leaves = given.leaves()
        optimizer = torch.optim.SGD([leaves["A"], leaves["B"]], lr=1e-3)
        before = [*weight.tensors.values(), *leaves.values(), given.dY]

        def steps(n: int) -> None:
            for step in range(n):
                x = inputs((1 + step % 3,), weight.shape[1], torch.float32, step)
                y = output(quantizer, weight, leaves | {"x": x})
                y.backward(torch.ones_like(y))
                optimizer.step()
                optimizer.zero_grad()

        steps(3)
        # less than a row of x for each step; Python itself keeps some objects for later use
        limit = STEPS * weight.shape[1] * 4 / 2
        for what, measure in MEASURES.items():
            with measure(before) as first:
                steps(3)
            with measure(before) as all_of_them:
                steps(STEPS)
            grown = all_of_them.alive - first.alive
            measurements.at_most(f"growth of {what}", grown, limit, unit="bytes")

    @needs(GRADIENTS)
    def test_peak_memory_on_cuda_is_tiles_and_activations(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails though the check on the CPU passes: the GPU's path makes a dense weight or keeps one."""
        if not torch.cuda.is_available():
            pytest.skip(f"{HARDWARE}no CUDA device")
        quantizer, on_cpu = _packed(quantizer)
        weight = on_cpu.to("cuda")
        for name, rows in ROWS.items():
            given = problem(weight.shape, torch.float32, rows=(rows,)).to("cuda")
            _step(quantizer, weight, given)
            found = _forward_and_backward(quantizer, weight, given, lambda _: cuda_footprint())
            for which, used in zip(("forward", "backward"), found, strict=True):
                measurements.at_most(
                    f"{which}, {name}, CUDA", used.peak, _peak_limit(given), unit="bytes"
                )
            with cuda_footprint() as kept:
                _step(quantizer, weight, given)
            limit = _dense_bytes(weight) / 16
            measurements.at_most(f"kept, {name}, CUDA", kept.alive, limit, unit="bytes")


def _packed(quantizer: Quantizer) -> tuple[Quantizer, PackedWeight]:
    """A weight of :data:`SHAPE`, with the instance that packed it: packed once for all checks of a configuration."""
    return _packed_once(type(quantizer), quantizer.options.model_dump_json())


@functools.lru_cache(maxsize=16)
def _packed_once(cls: type[Quantizer], options: str) -> tuple[Quantizer, PackedWeight]:
    quantizer = cls(cls.Options.model_validate_json(options))
    return quantizer, packed(quantizer, SHAPE)


def _peak_limit(given: Problem) -> float:
    """Bytes that a forward or a backward may take: eight tiles (a tile decoded in steps, from codes over integers to floats, takes
    about four, and the one before may still be there), and three times x and y in fp32 (the result, and copies in another basis).
    """
    activations = (given.x.numel() + given.dY.numel()) * 4
    return 8 * TILE + 3 * activations


def _dense_bytes(weight: PackedWeight) -> int:
    return weight.shape[0] * weight.shape[1] * 4


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _step(quantizer: Quantizer, weight: PackedWeight, given: Problem) -> None:
    """Forward and backward, everything training; nothing is returned."""
    output(quantizer, weight, given.leaves()).backward(given.dY)


def _forward_and_backward(
    quantizer: Quantizer,
    weight: PackedWeight,
    given: Problem,
    measure: Measure,
) -> tuple[Footprint, Footprint]:
    """What either takes within the tile budget."""
    leaves = given.leaves()
    before = [*leaves.values(), *weight.tensors.values(), given.dY]
    # on one thread: among threads that another process keeps from a core, 64 small tiles take minutes, and no byte more
    with tile_budget(TILE), one_thread():
        with measure(before) as forward:
            y = output(quantizer, weight, leaves)
        with measure([*before, y]) as backward:
            y.backward(given.dY)
    return forward, backward


def _held(quantizer: Quantizer) -> int:
    """Bytes of tensors and arrays in the instance's attributes, also inside of dicts and lists."""
    return sum(int(getattr(item, "nbytes", 0)) for item in _leaves(vars(quantizer)))


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
