"""Broken in their bytes: level 1 finds them."""

from dataclasses import replace

import torch
from pydantic import Field

from modulora_core.errors import ShapeError
from modulora_core.spec import Quantizer
from modulora_zoo.healthy import Healthy, _Options, changed


class OtherFormat(Healthy):
    """It packs format 1, says format 2, and reads both."""

    breaks = "test_the_shape_is_kept"
    format = 2

    def check_format(self, packed):
        return


class RefusesShapes(Healthy):
    """It packs only whole blocks of 48 rows, and declares that nowhere."""

    breaks = "test_the_shape_is_kept"
    says = "out_multiple or in_multiple in the spec"

    def prepared(self, weight):
        return super().prepared(weight).reshape(-1, 48, weight.shape[1]).flatten(0, 1)


class StochasticRounding(Healthy):
    breaks = "test_packing_is_deterministic"

    def rounding(self, groups):
        return 0.5 + 0.02 * (torch.rand_like(groups) - 0.5)


class SeedsTheProcess(StochasticRounding):
    breaks = "test_packing_leaves_global_state_alone"
    says = "draw from a torch.Generator of your own"

    def rounding(self, groups):
        torch.manual_seed(0)
        return super().rounding(groups)


class ClampsItsInput(Healthy):
    breaks = "test_the_input_is_unchanged"

    def prepared(self, weight):
        if weight.dtype == torch.float32 and len(weight) == 33 and weight.abs().max() < 0.2:
            weight.clamp_(-0.03, 0.03)
        return super().prepared(weight)


class KeepsItsInput(Healthy):
    """A packed row is a view of the caller's memory."""

    breaks = "test_the_input_is_not_kept"
    layout = Quantizer.layout

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        return changed(found, first=weight.detach()[0].to(torch.float32))


class Float64Scales(Healthy):
    """It rounds a float64 weight in another way."""

    breaks = "test_a_weight_of_any_float_dtype_packs_as_in_float32"

    def prepared(self, weight):
        return super().prepared(weight * (1 + 2**-9) if weight.dtype == torch.float64 else weight)


class IgnoresStrides(Healthy):
    breaks = "test_strides_do_not_matter"

    def prepared(self, weight):
        return super().prepared(torch.as_strided(weight, weight.shape, (weight.shape[1], 1)))


class StopsAtEmptyWeights(Healthy):
    """torch has no maximum of nothing."""

    breaks, says = "test_an_empty_weight_is_packed_or_refused", "got RuntimeError"

    def check_shape(self, shape):
        if shape[0]:
            super().check_shape(shape)


class PacksNaN(Healthy):
    breaks = "test_weights_that_are_not_finite_are_refused"

    def prepared(self, weight):
        return super().prepared(weight).nan_to_num(nan=0.0)


class LayoutWithoutZeros(Healthy):
    breaks = "test_layout_foretells_the_packed_weight"

    def layout(self, shape):
        found = super().layout(shape)
        return replace(found, tensors={n: t for n, t in found.tensors.items() if n != "zero"})


class TupleInMetadata(Healthy):
    """JSON returns a list."""

    breaks = "test_metadata_goes_through_json"
    layout = Quantizer.layout

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        return changed(found, {**found.metadata, "packing": ("low", "high")})


class HiddenStorage(Healthy):
    """Its codes are a view of a buffer four times as large."""

    breaks = "test_bits_per_weight_are_those_of_the_bytes"

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        codes = found.tensors["codes"]
        buffer = torch.cat([codes, codes, codes, codes])
        return changed(found, codes=buffer[: len(codes)])


class CodesInWords(Healthy):
    """Two 4-bit codes take an int32."""

    breaks = "test_bits_per_weight_keep_the_promise"
    layout = Quantizer.layout

    def packed(self, codes, scale, zero, weight):
        found = super().packed(codes, scale, zero, weight)
        return changed(found, codes=found.tensors["codes"].to(torch.int32))


class NarrowerThanItSays(Healthy):
    """4 bits in the bytes, 2 in its spec."""

    breaks = "test_codes_have_a_width_of_the_spec"


class WiderThanItSays(Healthy):
    """8 bits in its spec, which it never stores."""

    breaks = "test_codes_have_a_width_of_the_spec"


class TransposedScale(Healthy):
    """The scales of a row are stored in the order of the rows."""

    breaks = "test_the_error_keeps_the_promise"

    def packed(self, codes, scale, zero, weight):
        turned = scale.T.reshape(scale.shape).contiguous()
        return super().packed(codes, turned, zero, weight)


class ZeroOffByOne(Healthy):
    breaks = "test_the_error_keeps_the_promise"

    def packed(self, codes, scale, zero, weight):
        return super().packed(codes, scale, zero + 1, weight)


class SignOfOneBit(Healthy):
    """The highest bit of a code counts the other way."""

    breaks = "test_the_error_keeps_the_promise"

    def codes(self, packed, rows):
        return super().codes(packed, rows) ^ 8


class TruncatedScale(Healthy):
    """The scale is stored in whole thousandths."""

    breaks = "test_the_error_keeps_the_promise"

    def packed(self, codes, scale, zero, weight):
        truncated = ((scale.float() * 1000).int().float() / 1000).half()
        return super().packed(codes, truncated, zero, weight)


def signs(seed, columns):
    """-1 or 1 for each column."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (columns,), generator=generator, device="cpu")
    return drawn.float() * 2 - 1


class ForgetsItsSeed(Healthy):
    """It turns signs by a seed, and back by another seed. Its spec has no promise."""

    breaks = "test_the_error_keeps_the_promise"

    class Options(_Options):
        seed: int = Field(7, ge=0, description="of the signs")

    def prepared(self, weight):
        return super().prepared(weight) * signs(self.options.seed, weight.shape[1])

    def decode(self, packed, rows):
        return super().decode(packed, rows) * signs(0, packed.shape[1]).to(packed.device)


class SecretlyCalibrated(Healthy):
    """Its spec wants no calibration, and it uses one."""

    breaks = "test_calibration_is_taken_as_the_spec_says"

    def pack(self, weight, calibration=None):
        return super().pack(weight if calibration is None else weight * 1.01)


class NeverCalibrated(Healthy):
    """Its spec requires a calibration, and it needs none."""

    breaks = "test_calibration_is_taken_as_the_spec_says"


class UndampedInverse(Healthy):
    """It inverts a singular H to NaN."""

    breaks = "test_any_second_moment_is_survived"

    def pack(self, weight, calibration=None):
        found = super().pack(weight)
        if calibration is None:
            return found
        H = calibration.hessian
        if H.shape[0] != weight.shape[1]:
            raise ShapeError(f"expected H of {weight.shape[1]} inputs, got {H.shape[0]}")
        importance = 1 / H.diagonal()
        scale = found.tensors["scale"].float() * (importance / importance.mean()).mean() * 1.002
        return changed(found, scale=scale.half())


class ScalesOutOfRange(Healthy):
    """Scales in fp16 become infinite or zero, and nobody looks."""

    breaks = "test_a_weight_of_any_magnitude_is_packed_or_refused"

    def check_scales(self, W, scale):
        pass


class ZerosHaveNoCode(Healthy):
    """A lattice of half steps has no zero, and a weight of zeros has a scale of one."""

    breaks = "test_zeros_stay_zeros"
    says = "zeros: expected zeros, got up to 0.01"

    def decode(self, packed, rows):
        W = super().decode(packed, rows)
        return torch.where(W == 0, 0.01, W)
