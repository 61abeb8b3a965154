"""L1: packing gives the same bytes, of the promised size and error."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modulora_conformance.cases import (
    SETTINGS,
    both_ways,
    correlated,
    fit,
    gaussian,
    pack,
    packed,
    shapes,
    tile,
    weights,
)
from modulora_conformance.changes import check_same_bytes, clone, unchanged_globals
from modulora_conformance.checks import Level, needs
from modulora_core.errors import ModuLoRAError, WeightError
from modulora_core.packed import BITS_OF_DTYPE
from modulora_core.spec import Promise, Quantizer

DETERMINISTIC = "test_packing_is_deterministic"
GLOBALS = "test_packing_leaves_global_state_alone"
LAYOUT = "test_layout_foretells_the_packed_weight"

SIZE_SHAPE = (2048, 2048)
ERROR_SHAPE = (256, 512)
SCALES = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that hold no codes."""


class Packing(Level):
    """Packing gives the same bytes every time, of the promised size and with the promised error."""

    level, title = "L1", "packing"

    @needs()
    @SETTINGS
    @given(data=st.data())
    def test_the_shape_is_kept(self, quantizer, data):
        """If this fails: a packed weight has a wrong shape, quantizer or format.

        Or `pack` refuses a shape that `check_shape` accepts. No check of a higher level runs then.
        """
        shape = data.draw(shapes(quantizer))
        try:
            found = packed(quantizer, shape)
        except Exception as error:
            raise AssertionError(
                f"pack of a weight of shape {list(shape)}, which check_shape accepts: expected a "
                f"packed weight, got {type(error).__name__}: {error}; exclude the shape by "
                "out_multiple or in_multiple in the spec, or in check_shape"
            ) from error
        expected = {"shape": shape, "quantizer": quantizer.spec.name, "format": quantizer.format}
        for name, value in expected.items():
            assert getattr(found, name) == value, (
                f"packed.{name}: expected {value}, got {getattr(found, name)}"
            )

    def test_packing_is_deterministic(self, quantizer):
        """If this fails: the bytes depend on torch's random state, the instance or the threads.

        Draw from a torch.Generator whose seed is an option.
        """
        weight = gaussian(fit(quantizer, 48, 96), 1)
        first = pack(quantizer, weight)
        torch.manual_seed(torch.initial_seed() % 1000 + 1)
        torch.randn(17)
        check_same_bytes(first, pack(quantizer, weight), "packed again")
        other = type(quantizer)(quantizer.options)
        check_same_bytes(first, pack(other, weight), "packed by another instance")
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            check_same_bytes(first, pack(quantizer, weight), "packed with other threads")
        finally:
            torch.set_num_threads(threads)

    @needs(DETERMINISTIC)
    def test_packing_leaves_global_state_alone(self, quantizer):
        """If this fails: `pack` uses the global random state, changes a setting of torch or
        Python, prints, or leaves a file.

        A seed gives every layer the same dropout, and overrides the user's seed. Draw from a
        torch.Generator of your own. The number of threads and the gradient mode are the user's too.
        """
        for shape in ((21, 64), (40, 96)):
            weight = gaussian(fit(quantizer, *shape), 16)
            with unchanged_globals("pack"):
                pack(quantizer, weight)

    def test_the_input_is_unchanged(self, quantizer):
        """If this fails: `pack` writes to the weight or to H, which the caller may still use."""
        weight = gaussian(fit(quantizer, 33, 64), 2)
        calibration = correlated(weight.shape[1])
        before, hessian = weight.clone(), calibration.hessian.clone()
        versions = weight._version, calibration.hessian._version
        quantizer.pack(weight, None if quantizer.spec.calibration == "none" else calibration)
        assert torch.equal(weight, before), "the weight was changed"
        assert torch.equal(calibration.hessian, hessian), "the calibration's H was changed"
        assert versions == (weight._version, calibration.hessian._version), (
            "expected no write to the weight or to H, got one that was taken back"
        )

    @needs(DETERMINISTIC)
    def test_the_input_is_not_kept(self, quantizer):
        """If this fails: a packed tensor shares memory with the dense weight, and keeps it
        alive."""
        weight = gaussian(fit(quantizer, 33, 64), 3)  # fp32: no conversion copies it
        found = pack(quantizer, weight)
        before = clone(found)
        weight.zero_()
        check_same_bytes(before, found, "after the weight was overwritten")
        check_same_bytes(before, pack(quantizer, gaussian(found.shape, 3)), "packed again")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    @needs(DETERMINISTIC)
    def test_a_weight_of_any_float_dtype_packs_as_in_float32(self, quantizer, dtype):
        """If this fails: the same values in another dtype give other bytes than in float32.

        Convert the weight to float32 first.
        """
        exact_in_all = gaussian(fit(quantizer, 24, 96), 4).to(torch.float16).to(torch.bfloat16)
        expected = pack(quantizer, exact_in_all.to(torch.float32))
        check_same_bytes(expected, pack(quantizer, exact_in_all.to(dtype)), f"packed from {dtype}")

    @needs(DETERMINISTIC)
    def test_strides_do_not_matter(self, quantizer):
        """If this fails: a view, such as a transposed or sliced weight, is read in memory order.

        Call `.contiguous()`. A fused projection is packed from slices of one tensor.
        """
        weight = gaussian(fit(quantizer, 40, 72), 5)
        rows, columns = weight.shape
        wide = torch.zeros(rows + 3, 2 * columns)
        wide[3:, ::2] = weight
        equal = weight[:1].expand(rows, columns)
        views = {
            "transposed": (weight.T.contiguous().T, weight),
            "sliced": (wide[3:, ::2], weight),
            "expanded": (equal, equal.contiguous()),
        }
        for form, (view, copy) in views.items():
            expected = pack(quantizer, copy)
            check_same_bytes(expected, pack(quantizer, view), f"packed from a {form} weight")

    def test_an_empty_weight_is_packed_or_refused(self, quantizer):
        """If this fails: a weight without rows or columns stops `pack` with another library's
        error, or a tile or product of it has a wrong shape. Raise ShapeError, or pack it."""
        for shape in ((0, 256), (256, 0)):
            try:
                found = pack(quantizer, torch.empty(shape))
            except ModuLoRAError:
                continue
            except Exception as error:
                raise AssertionError(
                    f"pack of an empty weight, {list(shape)}: expected a packed weight or a "
                    f"ShapeError, got {type(error).__name__}: {error}"
                ) from error
            assert tile(quantizer, found).shape == shape, f"a tile of an empty weight, {shape}"
            for transpose, x in both_ways(found, 3):
                y = quantizer.matmul(x, found, transpose)
                expected = torch.zeros(3, shape[1 if transpose else 0])
                assert torch.equal(y, expected), f"a product with an empty weight, {shape}"

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
    def test_weights_that_are_not_finite_are_refused(self, quantizer, bad):
        """If this fails: NaN or Inf is packed silently, and the model is broken. Raise
        WeightError."""
        shape = fit(quantizer, 16, 80)
        for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
            weight = gaussian(shape, 6)
            weight[row, column] = bad
            with pytest.raises(WeightError):
                pack(quantizer, weight)

    @needs()
    @SETTINGS
    @given(data=st.data())
    def test_layout_foretells_the_packed_weight(self, quantizer, data):
        """If this fails: `layout(shape)` differs from the result of `pack`.

        Plans and disk-space checks are then wrong. Or the layout depends on the values, so that
        layers of one shape do not share it.
        """
        weight = data.draw(weights(quantizer))
        shape, made = (weight.shape[0], weight.shape[1]), pack(quantizer, weight).layout
        told = quantizer.layout(shape)
        assert told == made, f"layout({shape}) and pack: {told.differences(made)}"

    def test_metadata_goes_through_json(self, quantizer):
        """If this fails: config.json cannot hold the metadata, or changes it (a tuple to a
        list)."""
        layout = packed(quantizer, (24, 64)).layout
        again = type(layout).from_json(json.loads(json.dumps(layout.to_json())))
        assert again == layout, f"layout after JSON: {layout.differences(again)}"

    @needs("test_the_input_is_not_kept")
    def test_bits_per_weight_are_those_of_the_bytes(self, quantizer):
        """If this fails: the packed weight reports another size than its tensors have.

        Or it holds memory that it does not count.
        """
        found = packed(quantizer, (64, 128))
        nbytes = sum(
            t.numel() * BITS_OF_DTYPE[str(t.dtype).removeprefix("torch.")] // 8
            for t in found.tensors.values()
        )
        assert found.nbytes == nbytes, f"packed.nbytes: expected {nbytes}, got {found.nbytes}"
        bits = 8 * nbytes / math.prod(found.shape)
        assert math.isclose(found.bits_per_weight, bits), (
            f"bits_per_weight: expected {bits}, got {found.bits_per_weight}"
        )
        for name, t in found.tensors.items():
            assert t.untyped_storage().nbytes() <= 2 * max(64, t.nbytes), (
                f"packed tensor {name}: expected its own memory, got a view of a larger tensor"
            )

    @needs(LAYOUT)
    def test_bits_per_weight_keep_the_promise(self, quantizer, measurements):
        """If this fails: weights take more bytes than the spec promises, scales included."""
        promise = promise_of(quantizer) or pytest.skip(no_promise(quantizer))
        bits = quantizer.layout(fit(quantizer, *SIZE_SHAPE)).bits_per_weight
        measurements.at_most("bits per weight", bits, promise.bits_per_weight, unit="bits")

    @needs(LAYOUT, "test_bits_per_weight_keep_the_promise")
    def test_codes_have_a_width_of_the_spec(self, quantizer):
        """If this fails: spec.bits is not the width of the codes.

        Users of `modulora list-quantizers` rely on it. A packed tensor has a bit more for each
        weight than a width in spec.bits, or all tensors together have less than the smallest width.
        """
        layout, widths = quantizer.layout(fit(quantizer, *SIZE_SHAPE)), quantizer.spec.bits
        stored = [width for width in widths if width <= layout.bits_per_weight]
        assert stored, (
            f"spec.bits: expected a width within the {layout.bits_per_weight:.4g} bits per weight, "
            f"got {widths}"
        )
        for name, t in layout.tensors.items():
            bits = 8 * t.nbytes / math.prod(layout.shape)
            # codes in whole words take a little more: ten codes of 3 bits in an int32
            assert t.dtype in SCALES or bits < max(stored) + 1, (
                f"spec.bits: expected the width of the codes among them, got {widths}, but the "
                f"packed tensor {name} alone has {bits:.4g} bits for each weight"
            )


def promise_of(quantizer: Quantizer) -> Promise | None:
    """The spec's promise for these options."""
    cls = type(quantizer)
    for promise in quantizer.spec.promises:
        if cls.Options.model_validate(dict(promise.options)) == quantizer.options:
            return promise
    return None


def no_promise(quantizer: Quantizer) -> str:
    return f"spec.promises has no entry for {quantizer.options!r}, and --measure prints one"
