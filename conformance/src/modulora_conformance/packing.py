"""L1, packing: the same bytes every time, of the promised size, that stand for the weight as well as promised."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modulora_conformance.bits import check_same_bytes
from modulora_conformance.cases import (
    KINDS,
    SETTINGS,
    correlated,
    fit,
    gaussian,
    identity,
    pack,
    packed,
    seeds,
    shapes,
)
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.oracle import dense, relative_error, unlikeness
from modulora_conformance.random_state import unchanged_random_state
from modulora_conformance.results import NOT_OFFERED
from modulora_core.errors import ModuLoRAError, ShapeError, WeightError
from modulora_core.packed import BITS_OF_DTYPE, PackedWeight
from modulora_core.spec import Calibration, Promise, Quantizer

DETERMINISTIC = "test_packing_is_deterministic"

SIZE_SHAPE = (2048, 2048)
ERROR_SHAPE = (256, 512)

MARGIN = 1e-6
"""fp32 rounding in the measurement of an error."""

UNLIKE = 0.99
"""What :func:`~modulora_conformance.oracle.unlikeness` must be below without a promise: a cosine of 0.14. Values that have nothing to do
with the weight reach 0.99999; the coarsest options that the quantizers here take, a scale 20 times off at 2 bits, reach 0.96, and an error
of 2.2 itself, more than that of zeros: the error says nothing where no promise does."""

SCALES = ("float16", "bfloat16", "float32", "float64")
"""Dtypes of what isn't a code."""


class Packing(Level):
    level, title = "L1", "packing"

    @SETTINGS
    @given(data=st.data())
    def test_the_shape_is_kept(self, quantizer: Quantizer, data: st.DataObject) -> None:
        """If this fails: a packed weight says another shape, quantizer or format than it has, or `pack` refuses a shape that
        `check_shape` takes. Nothing else is run then, as everything else packs weights.
        """
        shape = data.draw(shapes(quantizer))
        found = _packed(quantizer, shape)
        assert found.shape == shape, f"packed.shape: expected {shape}, got {found.shape}"
        assert found.quantizer == quantizer.spec.name, (
            f"packed.quantizer: expected {quantizer.spec.name}, got {found.quantizer}"
        )
        assert found.format == quantizer.format, (
            f"packed.format: expected {quantizer.format}, got {found.format}"
        )

    def test_packing_is_deterministic(self, quantizer: Quantizer) -> None:
        """If this fails: the same weight gives other bytes another time: by torch's global random state, by a state in the
        instance, or by the number of threads. Draw from a generator with a seed of the options.
        """
        weight = gaussian(fit(quantizer, 48, 96), 1)
        first = pack(quantizer, weight)
        torch.manual_seed(torch.initial_seed() % 1000 + 1)
        torch.randn(17)
        check_same_bytes(first, pack(quantizer, weight), "packed again")
        check_same_bytes(
            first, pack(type(quantizer)(quantizer.options), weight), "packed by another instance"
        )
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            check_same_bytes(
                first, pack(quantizer, weight), "packed with another number of threads"
            )
        finally:
            torch.set_num_threads(threads)

    @needs(DETERMINISTIC)
    def test_packing_leaves_random_numbers_alone(self, quantizer: Quantizer) -> None:
        """If this fails: `pack` seeds or draws from the random numbers of the whole process: where it seeds them, every layer gets the
        same dropout, and a user's seed counts for nothing. Draw from a torch.Generator of your own.
        """
        for shape in ((21, 64), (40, 96)):
            weight = gaussian(fit(quantizer, *shape), 16)
            with unchanged_random_state("pack"):
                pack(quantizer, weight)

    def test_the_input_is_unchanged(self, quantizer: Quantizer) -> None:
        """If this fails: `pack` writes to the weight that it is given, which the caller may still use."""
        weight = gaussian(fit(quantizer, 33, 64), 2)
        before = weight.clone()
        calibration = None if quantizer.spec.calibration == "none" else correlated(weight.shape[1])
        hessian = None if calibration is None else calibration.hessian.clone()
        quantizer.pack(weight, calibration)
        assert torch.equal(weight, before), "the weight was changed"
        if calibration is not None and hessian is not None:
            assert torch.equal(calibration.hessian, hessian), "the calibration's H was changed"

    @needs(DETERMINISTIC)
    def test_the_input_is_not_kept(self, quantizer: Quantizer) -> None:
        """If this fails: a packed tensor shares memory with the weight. It keeps the dense weight alive, and changes with it."""
        weight = gaussian(fit(quantizer, 33, 64), 3)
        found = pack(quantizer, weight)
        before = {name: tensor.clone() for name, tensor in found.tensors.items()}
        weight.zero_()
        changed = [
            name for name, tensor in found.tensors.items() if not torch.equal(tensor, before[name])
        ]
        assert changed == [], f"packed tensors that changed with the weight: {', '.join(changed)}"
        # one that the caller holds as float32 already is the one that a plugin forgets to copy
        again = pack(quantizer, gaussian(found.shape, 3))
        check_same_bytes(
            PackedWeight(found.quantizer, found.format, found.shape, before, found.metadata),
            again,
            "packed again",
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    @needs(DETERMINISTIC)
    def test_a_weight_of_any_float_dtype_packs_as_in_float32(
        self, quantizer: Quantizer, dtype: torch.dtype
    ) -> None:
        """If this fails: a checkpoint in 16 bits gives another packed weight than the same values in float32. Convert to float32
        first.
        """
        weight = (
            gaussian(fit(quantizer, 24, 96), 4).to(torch.float16).to(torch.bfloat16)
        )  # exact in all of them
        check_same_bytes(
            pack(quantizer, weight.to(torch.float32)),
            pack(quantizer, weight.to(dtype)),
            f"packed from {dtype}",
        )

    @needs(DETERMINISTIC)
    def test_strides_do_not_matter(self, quantizer: Quantizer) -> None:
        """If this fails: a transposed or sliced weight, as models have them, is read in another order. Call `.contiguous()`."""
        shape = fit(quantizer, 40, 72)
        weight = gaussian(shape, 5)
        wide = torch.zeros(shape[0], 2 * shape[1])
        wide[:, ::2] = weight
        for what, strided in (("transposed", weight.T.contiguous().T), ("sliced", wide[:, ::2])):
            check_same_bytes(
                pack(quantizer, weight), pack(quantizer, strided), f"packed from a {what} weight"
            )

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    def test_weights_that_are_not_finite_are_refused(
        self, quantizer: Quantizer, bad: float
    ) -> None:
        """If this fails: NaN or Inf is packed into codes, and the model is broken without a word. Raise WeightError."""
        shape = fit(quantizer, 16, 80)
        for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
            weight = gaussian(shape, 6)
            weight[row, column] = bad
            with pytest.raises(WeightError):
                pack(quantizer, weight)

    @SETTINGS
    @given(data=st.data())
    def test_layout_foretells_the_packed_weight(
        self, quantizer: Quantizer, data: st.DataObject
    ) -> None:
        """If this fails: `layout(shape)` isn't what `pack` returns, so that plans and disk-space checks are wrong; or the layout
        depends on the values, and layers of one shape don't share it.
        """
        shape = data.draw(shapes(quantizer))
        found = pack(
            quantizer, data.draw(st.sampled_from(sorted(KINDS.items())))[1](shape, data.draw(seeds))
        ).layout
        assert quantizer.layout(shape) == found, (
            f"layout({shape}): expected {found}, got {quantizer.layout(shape)}"
        )

    def test_metadata_goes_through_json(self, quantizer: Quantizer) -> None:
        """If this fails: config.json can't hold the metadata, or gives other values back (a tuple becomes a list)."""
        layout = packed(quantizer, (24, 64)).layout
        assert type(layout).from_json(json.loads(json.dumps(layout.to_json()))) == layout

    @needs("test_the_input_is_not_kept")
    def test_bits_per_weight_are_those_of_the_bytes(self, quantizer: Quantizer) -> None:
        """If this fails: the packed weight says another size than its tensors have, or holds tensors that it doesn't count."""
        found = packed(quantizer, (64, 128))
        nbytes = sum(
            t.numel() * BITS_OF_DTYPE[str(t.dtype).removeprefix("torch.")] // 8
            for t in found.tensors.values()
        )
        assert found.nbytes == nbytes, f"packed.nbytes: expected {nbytes}, got {found.nbytes}"
        bits = 8 * nbytes / (found.shape[0] * found.shape[1])
        assert math.isclose(found.bits_per_weight, bits), (
            f"bits_per_weight: expected {bits}, got {found.bits_per_weight}"
        )
        hidden = [
            name
            for name, t in found.tensors.items()
            if t.untyped_storage().nbytes() > 2 * max(64, t.numel() * t.element_size())
        ]
        assert hidden == [], (
            f"packed tensors that are views into something larger, which memory holds: {', '.join(hidden)}"
        )

    @needs("test_layout_foretells_the_packed_weight")
    def test_bits_per_weight_keep_the_promise(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: weights take more bytes than the spec promises, scales and all."""
        promise = _promise(quantizer)
        bits = quantizer.layout(fit(quantizer, *SIZE_SHAPE)).bits_per_weight
        measurements.at_most("bits per weight", bits, promise.bits_per_weight, unit="bits")

    @needs("test_layout_foretells_the_packed_weight", "test_bits_per_weight_keep_the_promise")
    def test_codes_have_a_width_of_the_spec(self, quantizer: Quantizer) -> None:
        """If this fails: spec.bits doesn't say how wide the codes are, which is what users of `modulora list-quantizers` go by: a packed
        tensor has a bit more for each weight than a width in spec.bits, or all of them have less than the smallest.
        """
        layout, widths = quantizer.layout(fit(quantizer, *SIZE_SHAPE)), quantizer.spec.bits
        stored = [width for width in widths if width <= layout.bits_per_weight]
        assert stored, (
            f"spec.bits: expected a width that {layout.bits_per_weight:.4g} bits for a weight can hold, got {widths}"
        )
        found = {
            name: 8 * t.nbytes / math.prod(layout.shape)
            for name, t in layout.tensors.items()
            if t.dtype not in SCALES
        }
        name = max(found, key=lambda name: found[name], default=None)
        # codes in whole words take a little more than their width: ten of 3 bits in an int32
        assert name is None or found[name] < max(stored) + 1, (
            f"spec.bits: expected the width of the codes among them, got {widths}, where the packed tensor {name} alone has "
            f"{found[name]:.4g} bits for each weight"
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_error_keeps_the_promise(
        self, quantizer: Quantizer, measurements: Measurements, kind: str
    ) -> None:
        """If this fails: what the bytes stand for is further from the weight than the spec promises: scales, zero points, the order
        of codes, or their signs are wrong, or the promise is too bold. Options without a promise are held to this alone: normal weights
        must be like those packed, not like others, as where an option that reading needs isn't recorded.
        """
        promise = _promised(quantizer)
        if promise is None and kind != "gaussian":
            pytest.skip(_no_promise(quantizer))
        weight = KINDS[kind](fit(quantizer, *ERROR_SHAPE), 7)
        W = dense(quantizer, pack(quantizer, weight))
        if promise is None:
            measurements.at_most(
                "error of gaussian weights at the best scale", unlikeness(W, weight), UNLIKE
            )
            return
        error = relative_error(W, weight)
        measurements.at_most(
            f"error of {kind.replace('_', ' ')} weights", error, getattr(promise, kind) + MARGIN
        )

    @needs(DETERMINISTIC)
    def test_calibration_is_taken_as_the_spec_says(self, quantizer: Quantizer) -> None:
        """If this fails: spec.calibration doesn't say how `pack` behaves: "required" refuses to work without, "optional" takes it or
        leaves it, "none" gives the same bytes with and without.
        """
        weight = gaussian(fit(quantizer, 24, 64), 8)
        calibration = correlated(weight.shape[1])
        if quantizer.spec.calibration == "required":
            with pytest.raises(ModuLoRAError):
                quantizer.pack(weight, None)
        else:
            quantizer.pack(weight, None)
        found = quantizer.pack(weight, calibration)
        if quantizer.spec.calibration == "none":
            check_same_bytes(
                pack(quantizer, weight),
                found,
                "packed with a calibration, which the spec doesn't ask for",
            )

    @needs("test_calibration_is_taken_as_the_spec_says")
    @pytest.mark.parametrize("case", ["singular", "dead inputs", "no samples", "zero", "misfit"])
    def test_any_second_moment_is_survived(self, quantizer: Quantizer, case: str) -> None:
        """If this fails: an H that real calibration gives breaks `pack`, or makes values that aren't finite: a singular one (fewer
        samples than inputs), inputs that were always zero, an expert that no token reached (samples 0, H the identity). An H that
        doesn't fit the weight must be refused with ShapeError.
        """
        if quantizer.spec.calibration == "none":
            pytest.skip(f"{NOT_OFFERED}spec.calibration is none")
        weight = gaussian(fit(quantizer, 24, 64), 9)
        calibration = _second_moment(case, weight.shape[1])
        if case == "misfit":
            with pytest.raises(ShapeError):
                quantizer.pack(weight, calibration)
            return
        W = dense(quantizer, quantizer.pack(weight, calibration))
        assert bool(W.isfinite().all()), f"{case}: expected finite values, got NaN or Inf"
        error = relative_error(W, weight)
        assert error < 1.5, (
            f"{case}: expected weights like those packed, got a relative error of {error:.3g}"
        )


def _second_moment(case: str, n: int) -> Calibration:
    H = correlated(n).hessian
    if case == "singular":
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
        return Calibration(x.T @ x / 3, 3)
    if case == "dead inputs":
        alive = (torch.arange(n) % 4 != 1).to(H.dtype)
        return Calibration(H * alive[:, None] * alive, 4 * n)
    if case == "zero":
        return Calibration(torch.zeros(n, n), 8)
    return Calibration(torch.eye(n), 0) if case == "no samples" else identity(n + 1)


def _packed(quantizer: Quantizer, shape: tuple[int, int]) -> PackedWeight:
    try:
        return packed(quantizer, shape)
    except Exception as error:
        raise AssertionError(
            f"pack of a weight of shape {list(shape)}, which check_shape takes: expected a packed weight, got {type(error).__name__}: "
            f"{error}; where it can't take this shape, say so by out_multiple or in_multiple in the spec, or in check_shape"
        ) from error


def _promise(quantizer: Quantizer) -> Promise:
    """What the spec promises for these options; the check is skipped where that is nothing."""
    return _promised(quantizer) or pytest.skip(_no_promise(quantizer))


def _promised(quantizer: Quantizer) -> Promise | None:
    cls = type(quantizer)
    for promise in quantizer.spec.promises:
        if cls.Options.model_validate(dict(promise.options)) == quantizer.options:
            return promise
    return None


def _no_promise(quantizer: Quantizer) -> str:
    return f"spec.promises says nothing of {quantizer.options!r}: there is nothing to hold it to"
