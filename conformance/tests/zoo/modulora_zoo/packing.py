"""Broken in their bytes: level 1 finds them."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from modulora_core.errors import ShapeError
from modulora_core.packed import PackedLayout, PackedWeight
from modulora_core.spec import Calibration
from modulora_zoo.healthy import Healthy


class OtherFormat(Healthy):
    """Packs format 1 and says that it writes format 2; it reads both."""

    breaks = "test_the_shape_is_kept"
    format = 2

    def check_format(self, packed: PackedWeight | PackedLayout) -> None:
        return


class StochasticRounding(Healthy):
    """Rounds up or down by torch's global random state."""

    breaks = "test_packing_is_deterministic"

    def rounding(self, groups: Tensor) -> Tensor:
        return 0.5 + 0.02 * (torch.rand_like(groups) - 0.5)


class ClampsItsInput(Healthy):
    breaks = "test_the_input_is_unchanged"

    def prepared(self, weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32:
            weight.clamp_(-0.03, 0.03) if float(weight.abs().max()) < 0.2 and weight.shape[
                0
            ] == 33 else None
        return super().prepared(weight)


class KeepsItsInput(Healthy):
    """A "reference row" that is a view of the caller's memory."""

    breaks = "test_the_input_is_not_kept"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        found = super().packed(codes, scale, zero, weight)
        kept = weight.detach()[0].to(torch.float32)
        return PackedWeight(
            found.quantizer, 1, found.shape, {**found.tensors, "first": kept}, found.metadata
        )

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        from modulora_core.packed import TensorLayout

        found = super().layout(shape)
        return replace(
            found, tensors={**found.tensors, "first": TensorLayout("float32", (shape[1],))}
        )


class Float64Scales(Healthy):
    """Rounds differently when the weight comes in float64."""

    breaks = "test_a_weight_of_any_float_dtype_packs_as_in_float32"

    def prepared(self, weight: Tensor) -> Tensor:
        return super().prepared(weight * (1 + 2**-9) if weight.dtype == torch.float64 else weight)


class IgnoresStrides(Healthy):
    """Reads the memory as if it were contiguous."""

    breaks = "test_strides_do_not_matter"

    def prepared(self, weight: Tensor) -> Tensor:
        return super().prepared(torch.as_strided(weight, weight.shape, (weight.shape[1], 1)))


class PacksNaN(Healthy):
    breaks = "test_weights_that_are_not_finite_are_refused"

    def prepared(self, weight: Tensor) -> Tensor:
        return super().prepared(weight).nan_to_num(nan=0.0)


class LayoutWithoutScales(Healthy):
    """Its plan forgets the zeros."""

    breaks = "test_layout_foretells_the_packed_weight"

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        found = super().layout(shape)
        return replace(
            found, tensors={name: t for name, t in found.tensors.items() if name != "zero"}
        )


class TupleInMetadata(Healthy):
    """JSON gives a list back."""

    breaks = "test_metadata_goes_through_json"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        found = super().packed(codes, scale, zero, weight)
        return PackedWeight(
            found.quantizer,
            1,
            found.shape,
            found.tensors,
            {**found.metadata, "packing": ("low", "high")},
        )

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        found = super().layout(shape)
        return replace(found, metadata={**found.metadata, "packing": ("low", "high")})


class HiddenStorage(Healthy):
    """Its codes are the first part of a buffer four times as large."""

    breaks = "test_bits_per_weight_are_those_of_the_bytes"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        found = super().packed(codes, scale, zero, weight)
        buffer = torch.cat(
            [
                found.tensors["codes"].flatten(),
                torch.zeros(3 * found.tensors["codes"].numel(), dtype=torch.uint8),
            ]
        )
        part = buffer[: found.tensors["codes"].numel()].view(found.tensors["codes"].shape)
        return PackedWeight(
            found.quantizer, 1, found.shape, {**found.tensors, "codes": part}, found.metadata
        )


class CodesInWords(Healthy):
    """4-bit codes, two in an int32: a promised width that the bytes deny."""

    breaks = "test_bits_per_weight_keep_the_promise"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        found = super().packed(codes, scale, zero, weight)
        tensors = {**found.tensors, "codes": found.tensors["codes"].to(torch.int32)}
        return PackedWeight(found.quantizer, 1, found.shape, tensors, found.metadata)

    def layout(self, shape: tuple[int, int]) -> PackedLayout:
        found = super().layout(shape)
        return replace(
            found,
            tensors={**found.tensors, "codes": replace(found.tensors["codes"], dtype="int32")},
        )


class TransposedScale(Healthy):
    """The scales of a row are read in the order of the rows, where both orders have as many."""

    breaks = "test_the_error_keeps_the_promise"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        turned = scale.T.reshape(scale.shape).contiguous()
        return super().packed(codes, turned, zero, weight)


class ZeroOffByOne(Healthy):
    breaks = "test_the_error_keeps_the_promise"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        return super().packed(codes, scale, zero + 1, weight)


class SignOfOneBit(Healthy):
    """The highest bit of a code counts the other way."""

    breaks = "test_the_error_keeps_the_promise"

    def codes(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        return super().codes(packed, rows) ^ 8


class TruncatedScale(Healthy):
    """The scale goes through an integer, in thousandths."""

    breaks = "test_the_error_keeps_the_promise"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> PackedWeight:
        return super().packed(
            codes, ((scale.float() * 1000).int().float() / 1000).half(), zero, weight
        )


class SecretlyCalibrated(Healthy):
    """Its spec asks for no calibration, and it rounds by one all the same."""

    breaks = "test_calibration_is_taken_as_the_spec_says"

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        return super().pack(weight if calibration is None else weight * 1.01, None)


class NeverCalibrated(Healthy):
    """Its spec requires a calibration, and it does without."""

    breaks = "test_calibration_is_taken_as_the_spec_says"


class UndampedInverse(Healthy):
    """Inverts H as it comes: a singular one gives NaN."""

    breaks = "test_any_second_moment_is_survived"

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        if calibration is None:
            return super().pack(weight)
        H = calibration.hessian
        if H.shape[0] != weight.shape[1]:
            raise ShapeError(
                f"{self.spec.name}: expected H of {weight.shape[1]} inputs, got {H.shape[0]}"
            )
        found = super().pack(weight)
        importance = 1 / H.diagonal()
        scale = found.tensors["scale"].float() * (importance / importance.mean()).mean()
        return PackedWeight(
            found.quantizer,
            1,
            found.shape,
            {**found.tensors, "scale": scale.half()},
            found.metadata,
        )


class RefusesShapes(Healthy):
    """Packs whole blocks of 48 rows, and says so nowhere."""

    breaks = "test_the_shape_is_kept"
    says = "out_multiple or in_multiple in the spec"

    def prepared(self, weight: Tensor) -> Tensor:
        return super().prepared(weight).reshape(-1, 48, weight.shape[1]).flatten(0, 1)


class SeedsTheProcess(Healthy):
    """Draws its dither from torch's own generator, which it seeds."""

    breaks = "test_packing_leaves_random_numbers_alone"
    says = "draw from a torch.Generator of your own"

    def rounding(self, groups: Tensor) -> Tensor:
        torch.manual_seed(0)
        return 0.5 + 0.02 * (torch.rand_like(groups) - 0.5)


class NarrowerThanItSays(Healthy):
    """Four bits in the bytes, two in its spec."""

    breaks = "test_codes_have_a_width_of_the_spec"


class WiderThanItSays(Healthy):
    """Eight bits in its spec, which it never stores."""

    breaks = "test_codes_have_a_width_of_the_spec"


class _Seeded(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(32, ge=2, description="weights that share a scale")
    seed: int = Field(7, ge=0, description="of the signs")


class ForgetsItsSeed(Healthy):
    """Turns signs by a seed, and turns them back by another; of these options its spec promises nothing."""

    breaks = "test_the_error_keeps_the_promise"
    Options = _Seeded

    def prepared(self, weight: Tensor) -> Tensor:
        return super().prepared(weight) * signs(self.options.seed, weight.shape[1])

    def decode(self, packed: PackedWeight, rows: tuple[int, int]) -> Tensor:
        return super().decode(packed, rows) * signs(0, packed.shape[1])


def signs(seed: int, columns: int) -> Tensor:
    """-1 or 1 for each column."""
    return (
        torch.randint(2, (columns,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
    )
