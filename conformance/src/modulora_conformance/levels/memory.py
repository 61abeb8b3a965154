"""L5: a layer takes the memory of tiles and activations, and keeps none of it."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from modulora_conformance.allocations import Allocations
from modulora_conformance.cases import (
    both_ways,
    correlated,
    fit,
    gaussian,
    inputs,
    pack,
    packed,
    tile,
)
from modulora_conformance.changes import check_same_bytes, clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.footprints import (
    MEASURES,
    Measure,
    cuda_footprint,
    new_objects,
    packing_peaks,
    tensor_footprint,
)
from modulora_conformance.levels.calibrated import REMEMBERED
from modulora_conformance.levels.gradients import GRADIENTS
from modulora_conformance.levels.packing import DETERMINISTIC
from modulora_conformance.levels.state import APART, NEW
from modulora_conformance.levels.tiles import LITTLE, OWNED
from modulora_conformance.memo import once
from modulora_conformance.problems import SCALE, Problem, output, problem
from modulora_conformance.results import HARDWARE, Measurements
from modulora_core.autograd import FrozenWeight, lora_linear
from modulora_core.dense_products import one_thread
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.tiles import tile_budget

SAVED = "test_autograd_saves_no_weight"
PEAK = "test_peak_memory_is_tiles_and_activations"
KEPT = "test_nothing_is_kept_after_a_call"
GROWTH = "test_memory_does_not_grow_over_50_steps"

SHAPE = (512, 512)
"""1 MiB of dense fp32, 64 tiles. Powers of two, which every quantizer packs fast."""

SCRATCH = 8 * 2**20
"""Bytes that packing may take for any weight: fixed blocks of some rows."""

TILE = 16 * 2**10

ROWS = {"few rows": 2, "many rows": 34}
"""Kernels for few rows commonly end at 32."""

TEXT = 257
"""Rows of a longer text. x and y are smaller than three quarters of a dense weight."""

STEPS = 50

CALLS = 1000

GROWN = 24 * CALLS
"""Bytes: less than one number and its place in a list for each call."""

OBJECTS = CALLS // 4

OFTEN, USES = (48, 96), 250


class Memory(Level):
    """No dense weight outlives a tile, so that a model trains that does not fit in memory.

    Peaks are counted above the packed weight and the caller's tensors. Memory that a compiled
    kernel allocates for itself is invisible."""

    level, title = "L5", "memory"

    @needs(DETERMINISTIC)
    def test_packing_takes_the_promised_memory(self, quantizer, measurements):
        """If this fails: `pack` holds more copies of the weight than spec.packing_memory says.

        Plans of `modulora plan` are then too small. Work on a few rows at a time, free copies
        early, or promise more.
        """
        peaks, unit = packing_peaks(quantizer)
        limit = quantizer.spec.packing_memory * unit + SCRATCH
        for name, peak in peaks.items():
            needed = f"packing_memory={-(-(peak - SCRATCH) // unit)} has room for it"
            measurements.at_most(f"packing, {name}", peak, limit, unit="bytes", case=needed)

    @needs(GRADIENTS)
    def test_autograd_saves_no_weight(self, quantizer, measurements):
        """If this fails: the result of `matmul` is a view of a much larger tensor.

        Autograd then saves the larger one until the backward. Return a tensor with its own memory.
        """
        quantizer, weight = _packed(quantizer)
        given = problem(weight.shape, torch.float32, rows=(ROWS["few rows"],))
        x, A, B, bias = given.leaves().values()
        u, v = (torch.ones(n, requires_grad=True) for n in reversed(weight.shape))
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        frozen = FrozenWeight(quantizer, weight)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = lora_linear(x, frozen, bias, A, B, scale=SCALE, input_scale=u, output_scale=v)
        for tensor in weight.tensors.values():
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        # the adapter saves x, x Aᵀ [n, r], A and B; the scales save x, u, Z [n, out] and v
        needed = sum(t.nbytes for t in (x, A, B, u, v, y)) + len(x) * len(A) * 4
        beyond = max(0, sum(saved.values()) - needed)
        measurements.at_most("saved beyond x and the adapter", beyond, 0, unit="bytes")

    @needs(GRADIENTS, LITTLE, SAVED)
    def test_peak_memory_is_tiles_and_activations(self, quantizer, measurements):
        """If this fails: `matmul` makes a dense weight, or much of one, or unpacks all codes.

        Decode one tile at a time, within `tiles.tile_bytes`.
        """
        quantizer, weight = _packed(quantizer)
        for name, rows in ROWS.items():
            given = problem(weight.shape, torch.float32, rows=(rows,))
            with tensor_footprint([]):  # whatever is made once exists after it
                _step(quantizer, weight, given)
            for unit, measure in MEASURES.items():  # a tile may be a numpy array
                _check_peaks(quantizer, weight, given, measure, measurements, f"{name}, {unit}")
        for transpose, x in both_ways(weight, TEXT, seed=88):
            operands = [*weight.tensors.values(), x]
            with tile_budget(TILE), one_thread(), Allocations(operands) as allocations:
                quantizer.matmul(x, weight, transpose)
            name, limit = f"largest tensor, {TEXT} rows", 3 * weight.shape[0] * weight.shape[1]
            measurements.at_most(name, allocations.largest, limit, unit="bytes")

    @needs(GRADIENTS, OWNED, PEAK)
    def test_nothing_is_kept_after_a_call(self, quantizer, measurements):
        """If this fails: a decoded weight, unpacked codes or a tile survives the call.

        A cache, a module's variable, or the quantizer, which all layers share, holds it.
        """
        quantizer, weight = _packed(quantizer)
        few, many = (problem(weight.shape, torch.float32, rows=(n,)) for n in ROWS.values())
        _step(quantizer, weight, few)
        held = _held(quantizer)
        limit = _kept_limit(weight)
        for name, measure in MEASURES.items():
            another = clone(weight)  # a cache by weight is filled again
            given = [tensor for p in (few, many) for tensor in (*p.operands.values(), p.dY)]
            with measure([*another.tensors.values(), *given]) as found:
                _step(quantizer, another, few)
                _step(quantizer, another, many)
                tile(quantizer, another)
            measurements.at_most(f"{name} kept", found.alive, limit, unit="bytes")
        measurements.at_most("kept in the quantizer", _held(quantizer) - held, limit, unit="bytes")
        another = clone(weight)
        alive = [weakref.ref(tensor) for tensor in another.tensors.values()]
        _step(quantizer, another, few)
        del another, given
        gc.collect()
        assert not any(tensor() is not None for tensor in alive), (
            "a packed weight that nobody uses: expected its memory freed, got a reference to it"
        )

    @needs(GRADIENTS, PEAK, KEPT)
    def test_memory_does_not_grow_over_50_steps(self, quantizer, measurements):
        """If this fails: each call leaves something behind.

        Look for a list that grows, a cache without a bound, one by the number of rows, and a
        reference to operands.
        """
        weight = packed(quantizer, (64, 512))
        given = problem(weight.shape, torch.float32, rows=(ROWS["few rows"],))
        leaves = given.leaves()
        optimizer = torch.optim.SGD([leaves["A"], leaves["B"]], lr=1e-3)
        before = [*weight.tensors.values(), *leaves.values(), given.dY]

        def steps(n: int) -> None:
            for step in range(n):
                x = inputs((1 + step,), weight.shape[1], torch.float32, step)
                y = output(quantizer, weight, leaves | {"x": x})
                y.backward(torch.ones_like(y))
                optimizer.step()
                optimizer.zero_grad()

        steps(3)
        # less than a row of x for each step; Python itself keeps some objects for later use
        limit = STEPS * weight.shape[1] * 4 / 2
        for name, measure in MEASURES.items():
            with measure(before) as first:
                steps(3)
            with measure(before) as last:
                steps(STEPS)
            grown = last.alive - first.alive
            measurements.at_most(f"growth of {name}", grown, limit, unit="bytes")

    @needs(GRADIENTS)
    def test_peak_memory_on_cuda_is_tiles_and_activations(self, quantizer, measurements):
        """If this fails, though the check on the CPU passes: the GPU's code makes or keeps a dense
        weight."""
        if not torch.cuda.is_available():
            pytest.skip(f"{HARDWARE}no CUDA device")
        quantizer, on_cpu = _packed(quantizer)
        weight = on_cpu.to("cuda")
        for name, rows in ROWS.items():
            given = problem(weight.shape, torch.float32, rows=(rows,)).to("cuda")
            _step(quantizer, weight, given)
            _check_peaks(quantizer, weight, given, cuda_footprint, measurements, f"{name}, CUDA")
            with cuda_footprint([]) as kept:
                _step(quantizer, weight, given)
            limit = _kept_limit(weight)
            measurements.at_most(f"kept, {name}, CUDA", kept.alive, limit, unit="bytes")

    @needs(GRADIENTS, KEPT, PEAK)
    def test_operands_and_results_are_freed(self, quantizer):
        """If this fails: x, W, H, dY, a tile or a result stays in memory after its last use.

        The instance, a module or a cache has a reference to it, or to a view of it. Keep nothing.
        """
        cls = type(quantizer)
        reader = cls(quantizer.options)  # it lives on, as in a model
        with new_objects():
            alive = _used(reader, fit(quantizer, 36, 76))
            gc.collect()
        kept = [name for name, storage in alive.items() if not storage.expired()]
        assert not kept, (
            f"expected everything freed after its last reference, got {', '.join(kept)} alive"
        )

    @needs(GRADIENTS, KEPT, GROWTH)
    def test_a_thousand_calls_leave_nothing(self, quantizer, measurements):
        """If this fails: each tile, lookup or product leaves a few bytes or an object behind.

        A list, a counter by shape or a log grows. A server calls millions of times.
        """
        weight = pack(quantizer, gaussian(fit(quantizer, 8, 16), 80))
        ids = torch.tensor([1, 0])

        def calls(n: int) -> None:
            for i in range(n):
                found = clone(weight)  # a cache by identity grows too
                x = torch.ones(1 + i % 3, weight.shape[1])
                quantizer.matmul(x, found)
                if i % 4 == 0:
                    y = torch.ones(1 + i % 3, weight.shape[0])
                    quantizer.matmul(y, found, True)
                    quantizer.lookup(ids, found, torch.float32)
                    tile(quantizer, found)

        calls(200)
        with new_objects():
            tracemalloc.start()
            try:
                calls(50)  # tracing itself makes objects first
                gc.collect()
                objects, before = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
                calls(CALLS)
                gc.collect()
                more = len(gc.get_objects()) - objects
                grown = tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
        measurements.at_most("growth over 1,000 calls", max(0, grown), GROWN, unit="bytes")
        assert more <= OBJECTS, f"1,000 calls: expected no new objects, got {more}"

    @needs(GRADIENTS, KEPT)
    def test_many_uses_of_one_weight_keep_nothing(self, quantizer, measurements):
        """If this fails: a weight that is used often is kept decoded.

        A cache of the layers in use holds a whole model, dense. Decode again each time.
        """
        weight = pack(quantizer, gaussian(fit(quantizer, *OFTEN), 85))
        ids = torch.tensor([3, 0, 3])
        operands = [*both_ways(weight, 1, seed=86), *both_ways(weight, 40, seed=87)]

        def use(times: int) -> None:
            for i in range(times):
                for transpose, x in operands[:2] if i % 10 else operands:
                    quantizer.matmul(x, weight, transpose)
                quantizer.lookup(ids, weight, torch.float32)
                if i % 10 == 0:
                    tile(quantizer, weight)

        use(10)  # whatever is made once exists now
        before = [*weight.tensors.values(), *(x for _, x in operands)]
        with tensor_footprint(before) as found:
            use(USES)
        limit = weight.shape[0] * weight.shape[1]  # a byte for each weight
        measurements.at_most("kept after 250 uses", found.alive, limit, unit="bytes")

    @needs(DETERMINISTIC, APART, NEW)
    def test_layers_packed_before_change_no_byte(self, quantizer):
        """If this fails: an instance that has packed other layers packs this one differently.

        A buffer or a table of another layer, of the same or of another width, is used again. A
        model's layers are packed by one instance, with calibration and without.
        """
        cls, shapes = type(quantizer), [fit(quantizer, *s) for s in ((18, 96), (50, 96), (18, 160))]
        required = quantizer.spec.calibration == "required"
        kinds = {"none": (False,), "required": (True,)}.get(
            quantizer.spec.calibration, (False, True)
        )
        for with_h in kinds:
            W = gaussian(shapes[0], 81)
            H = correlated(shapes[0][1], 5) if with_h else None
            expected = cls(quantizer.options).pack(W, H)
            used = cls(quantizer.options)
            for i, shape in enumerate((*shapes[::-1], shapes[1])):
                other = 3 * gaussian(shape, 82 + i)
                used.pack(other, correlated(shape[1], 6 + i) if i % 2 or required else None)
                if kinds == (False,) or required or i % 2:
                    continue
                used.pack(other, None)
            check_same_bytes(expected, used.pack(W, H), "packed after other layers")

    @needs(DETERMINISTIC, REMEMBERED)
    def test_an_h_at_an_address_that_was_used_before_is_another(self, quantizer):
        """If this fails: for an H or a weight in memory that an earlier one had, the old is used.

        H of a layer is freed before the H of the next one comes, often at the same address. No
        address and no id is a key.
        """
        shape = fit(quantizer, 20, 72)
        places = [np.empty((n, shape[1]), np.float32) for n in (shape[0], shape[1])]
        calibrated = quantizer.spec.calibration != "none" and quantizer.wants_calibration
        values = [
            (gaussian(shape, 90 + i), correlated(shape[1], 10 + i).hessian * (1 + i))
            for i in range(3)
        ]
        copies = [
            (W.clone(), H.clone()) for W, H in values
        ]  # alive together: no address is used again
        fresh = [
            type(quantizer)(quantizer.options).pack(W, Calibration(H, 64) if calibrated else None)
            for W, H in copies
        ]
        for i, (W, H) in enumerate(values):
            here = []
            for place, tensor in zip(places, (W, H), strict=True):
                place[:] = tensor.numpy()
                here.append(torch.from_numpy(place))
            calibration = Calibration(here[1], 64) if calibrated else None
            found = quantizer.pack(here[0], calibration)
            del here, calibration
            check_same_bytes(fresh[i], found, f"packed from the memory of {i} earlier weights")


@once(most=16)
def _packed(quantizer: Quantizer) -> tuple[Quantizer, PackedWeight]:
    """A weight of :data:`SHAPE` and the instance that packed it, cached for all checks."""
    return quantizer, packed(quantizer, SHAPE)


def _step(quantizer: Quantizer, weight: PackedWeight, given: Problem) -> None:
    """Forward and backward with everything training. Returns nothing."""
    output(quantizer, weight, given.leaves()).backward(given.dY)


def _kept_limit(weight: PackedWeight) -> float:
    """Less than the codes at 4 bits; an index, or a vector for each side, fits."""
    return weight.shape[0] * weight.shape[1] * 4 / 16


def _check_peaks(
    quantizer: Quantizer,
    weight: PackedWeight,
    given: Problem,
    measure: Measure,
    measurements: Measurements,
    case: str,
) -> None:
    """Limit the peaks of a forward and a backward within the tile budget.

    Eight tiles: decoding in steps, from codes over integers to floats, takes about four, beside the
    tile before. Three times x and y: the result, and copies in another basis.
    """
    leaves = given.leaves()
    before = [*leaves.values(), *weight.tensors.values(), given.dY]
    limit = 8 * TILE + 3 * (given.x.numel() + given.dY.numel()) * 4
    # one thread: on a busy machine, many threads for 64 small tiles take minutes
    with tile_budget(TILE), one_thread():
        with measure(before) as forward:
            y = output(quantizer, weight, leaves)
        with measure([*before, y]) as backward:
            y.backward(given.dY)
    measurements.at_most(f"forward, {case}", forward.peak, limit, unit="bytes")
    measurements.at_most(f"backward, {case}", backward.peak, limit, unit="bytes")


def _held(value: object) -> int:
    """Bytes of tensors and arrays in an instance's attributes, and in its dicts and lists."""
    if isinstance(value, Quantizer):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return sum(_held(item) for item in value)
    return int(getattr(value, "nbytes", 0))


def _used(quantizer: Quantizer, shape: tuple[int, int]) -> dict[str, StorageWeakRef]:
    """Everything that packing, reading, multiplying and a step used, by name."""
    used: dict[str, Tensor] = {"W": gaussian(shape, 83)}
    calibration = None
    if quantizer.spec.calibration != "none":
        calibration = correlated(shape[1], 3)
        used["H"] = calibration.hessian
    weight = quantizer.pack(used["W"], calibration)
    used |= {f"the packed tensor {name}": tensor for name, tensor in weight.tensors.items()}
    used["the ids"] = torch.tensor([3, 1, 3])
    used["looked up rows"] = quantizer.lookup(used["the ids"], weight, torch.float32)
    for rows in (1, 4, 37):
        used[f"a tile of {rows} rows"] = tile(quantizer, weight, torch.float32, 0, min(rows, 4))
        for dtype in (torch.float32, torch.bfloat16):
            for transpose, x in both_ways(weight, rows, dtype=dtype, seed=84):
                name = "dY" if transpose else "x"
                used[f"{name} of {rows} rows in {dtype}"] = x
                y = quantizer.matmul(x, weight, transpose)
                used[f"the product of {name}, {rows} rows in {dtype}"] = y
    given = problem(shape, torch.float32, rows=(5,))
    leaves = given.leaves()
    y = output(quantizer, weight, leaves)
    y.backward(given.dY)
    used |= {f"{name} of a step": tensor for name, tensor in leaves.items()}
    used |= {"dY of a step": given.dY, "Y of a step": y.detach()}
    return {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in used.items()}
