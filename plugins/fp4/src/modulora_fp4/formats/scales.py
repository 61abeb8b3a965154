"""Refuse scales that are damaged, and weights of another type than a format holds."""

from __future__ import annotations

from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import Read, StoredWeight, read_finite
from modulora_fp4 import SPEC
from modulora_fp4.reference import scale_values


def check_scales(name: str, kind: str, scales: Tensor) -> Tensor:
    """The same codes, uint8. Raises CheckpointError: NaN, or a power of two beyond 2¹⁰⁰."""
    values = scale_values(kind, scales.device)
    damaged = (values == 0).logical_and_(values.signbit().logical_not_())
    damaged[0] = False  # a scale of zero, or the smallest power of two
    found = damaged[scales.int()]
    if bool(found.any()):
        raise CheckpointError(
            f"{name}: expected {kind} scales, got the byte {int(scales[found][0])}, which is no "
            "number or a huge one; the file is damaged"
        )
    return scales


def read_positive(read: Read, name: str) -> Tensor:
    """Read one number of a weight, fp32 ``[1]``. Raises CheckpointError: it isn't positive."""
    number = read_finite(read, name).reshape(1)
    if not bool(number > 0):
        raise CheckpointError(
            f"{name}: expected a positive number, got {float(number):g}; the file is damaged"
        )
    return number


def check_type(weight: StoredWeight, kind: str, format_name: str) -> None:
    """Refuse a weight of another type. Raises ModelError."""
    name, metadata = weight.quantizer.spec.name, weight.layout.metadata
    got = f"{name} {metadata.get('type', '')}".strip()
    if got != f"{SPEC.name} {kind}":
        raise ModelError(
            f"packed by {got}; {format_name} holds weights of {SPEC.name} with type={kind} only. "
            "Unpack the model with `modulora merge`, and quantize it again"
        )
