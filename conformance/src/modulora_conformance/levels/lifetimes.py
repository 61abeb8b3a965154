"""L5: nothing stays alive after its owner has dropped it, and nothing is left over from before."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from modulora_conformance.cases import both_ways, correlated, fit, gaussian, pack, tile
from modulora_conformance.changes import check_same_bytes, clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.footprints import new_objects, tensor_footprint
from modulora_conformance.levels.calibrated import REMEMBERED
from modulora_conformance.levels.gradients import GRADIENTS
from modulora_conformance.levels.memory import GROWTH, KEPT, PEAK
from modulora_conformance.levels.packing import DETERMINISTIC
from modulora_conformance.levels.state import APART, NEW
from modulora_conformance.problems import output, problem
from modulora_conformance.results import Measurements
from modulora_core.spec import Calibration, Quantizer

CALLS = 1000

GROWN = 24 * CALLS
"""Bytes: less than one number and its place in a list for each call."""

OBJECTS = CALLS // 4

OFTEN, USES = (48, 96), 250


class Lifetimes(Level):
    """Operands and results are freed with their last reference, and leave no trace."""

    level, title = "L5", "memory"

    @needs(GRADIENTS, KEPT, PEAK)
    def test_operands_and_results_are_freed(self, quantizer: Quantizer) -> None:
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
    def test_a_thousand_calls_leave_nothing(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
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
    def test_many_uses_of_one_weight_keep_nothing(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
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
    def test_layers_packed_before_change_no_byte(self, quantizer: Quantizer) -> None:
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
    def test_an_h_at_an_address_that_was_used_before_is_another(self, quantizer: Quantizer) -> None:
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
