"""A sound quantizer: 4-bit round-to-nearest by groups, with methods that the others override."""

import threading
import time

import torch
from pydantic import BaseModel, ConfigDict, Field

from modulora_core.errors import WeightError
from modulora_core.spec import PackedLayout, PackedWeight, Quantizer, TensorLayout, check_rows
from modulora_zoo import SPECS

LEVELS = 15

MOST = 30.0
"""Seconds that a thread waits for another one, which takes milliseconds on an idle machine."""


def meet(quantizer):
    """Of two threads that share an instance, let the first wait until the second comes here too.

    A race that a quantizer has on purpose is then found every time. Call this between the writing
    of what both share and its reading."""
    if threading.current_thread() is threading.main_thread():
        return
    own, me = vars(quantizer), threading.get_ident()
    end = time.monotonic() + (MOST if own.setdefault("first", me) == me else 0)
    while "met" not in own and time.monotonic() < end:
        time.sleep(1e-3)  # without the GIL, as a kernel
    own["met"] = True


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    group_size: int = Field(32, ge=2, description="weights of a row that share a scale and a zero")


class Healthy(Quantizer):
    """Codes: two in a byte, ``[out, in / 2]``. Scales and zeros (codes of 0): fp16 ``[out,
    groups]``."""

    spec = SPECS["Healthy"]
    Options = _Options

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.spec = SPECS.get(cls.__name__, cls.spec)

    def pack(self, weight, calibration=None):
        self.check_shape((weight.shape[0], weight.shape[1]))
        W = self.prepared(weight)
        self.check_finite(W)
        groups = self.grouped(W)  # [out, groups, G]
        low, high = self.limits(groups)
        scale = ((high - low) / LEVELS).half()
        self.check_scales(W, scale)
        step = scale.float().clamp(min=1e-8)
        zero = (-low / step).half()
        codes = groups / step[..., None] + zero.float()[..., None]
        codes = codes.add(self.rounding(groups)).floor().clamp(0, LEVELS).to(torch.uint8)
        return self.packed(codes.flatten(1)[:, : W.shape[1]], scale, zero, weight)

    def check_finite(self, W):
        if not bool(W.isfinite().all()):
            raise WeightError(f"{self.spec.name}: expected a finite weight, got NaN or Inf")

    def limits(self, groups):
        return groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)

    def check_scales(self, W, scale):
        if bool(scale.isinf().any()) or (float(scale.max()) < 1e-6 and bool(W.any())):
            raise WeightError(f"{self.spec.name}: expected weights whose scales fp16 can hold")

    def prepared(self, weight):
        return weight.detach().to(torch.float32).contiguous()

    def grouped(self, W):
        n, G = -(-W.shape[1] // self.options.group_size), self.options.group_size
        padded = torch.cat([W, W[:, -1:].expand(-1, n * G - W.shape[1])], dim=1)
        return padded.reshape(W.shape[0], n, G)

    def rounding(self, groups):
        return 0.5

    def packed(self, codes, scale, zero, weight):
        tensors = {"codes": codes[:, ::2] | codes[:, 1::2] << 4, "scale": scale, "zero": zero}
        shape, metadata = tuple(weight.shape), {"group_size": self.options.group_size}
        return PackedWeight(self.spec.name, 1, shape, tensors, metadata)

    def of(self, shape, **tensors):
        """A layout without metadata."""
        tensors = {name: TensorLayout(*layout) for name, layout in tensors.items()}
        return PackedLayout(self.spec.name, 1, shape, tensors)

    def layout(self, shape):
        groups = TensorLayout("float16", (shape[0], -(-shape[1] // self.options.group_size)))
        codes = TensorLayout("uint8", (shape[0], shape[1] // 2))
        tensors = {"codes": codes, "scale": groups, "zero": groups}
        metadata = {"group_size": self.options.group_size}
        return PackedLayout(self.spec.name, 1, shape, tensors, metadata)

    def dequantize_tile(self, packed, rows, dtype):
        check_rows(packed, rows)
        return self.decode(packed, rows).to(dtype)

    def codes(self, packed, rows):
        """uint8 ``[rows, in]``."""
        nibbles = packed.tensors["codes"][slice(*rows)]
        return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)

    def decode(self, packed, rows):
        """fp32 ``[rows, in]``."""
        scale, zero = (self.spread(packed, name, rows) for name in ("scale", "zero"))
        return (self.codes(packed, rows).float() - zero) * scale

    def spread(self, packed, name, rows):
        """A value of each group at each of its weights, fp32 ``[rows, in]``."""
        values = packed.tensors[name][slice(*rows)].float()
        return values.repeat_interleave(packed.metadata["group_size"], 1)[:, : packed.shape[1]]


class _ChangesProducts(Healthy):
    """Broken after a right product: subclasses have ``product(y, x, packed, transpose)``."""

    def matmul(self, x, packed, transpose=False):
        return self.product(super().matmul(x, packed, transpose), x, packed, transpose)


def changed(packed, metadata=None, **tensors):
    """A packed weight with other tensors or metadata."""
    tensors, metadata = {**packed.tensors, **tensors}, metadata or packed.metadata
    return PackedWeight(packed.quantizer, 1, packed.shape, tensors, metadata)


def rows_of(x):
    return x.shape[:-1].numel()
