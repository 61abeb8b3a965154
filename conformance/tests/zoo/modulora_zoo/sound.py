"""Sound quantizers of other kinds: per row, rotated, on a lattice, in floating point, experts."""

from functools import lru_cache

import torch
from modulora_kernels import KernelQuantizer
from modulora_kernels.rotation import rotate
from modulora_kernels.rotation import signs as random_signs

from modulora_core.errors import ShapeError
from modulora_core.packed import TensorLayout
from modulora_zoo import SPECS
from modulora_zoo.healthy import Healthy
from modulora_zoo.packing import signs


class _TwoTensors(Healthy):
    """Codes and scales, which ``quantized(W)`` gives."""

    def pack(self, weight, calibration=None):
        self.check_shape((weight.shape[0], weight.shape[1]))
        W = self.prepared(weight)
        self.check_finite(W)
        codes, scale = self.quantized(W)
        return self.layout(tuple(W.shape)).fill({"codes": codes, "scale": scale})


class PerRow(_TwoTensors):
    """A scale for each row, and no zero point: codes from -127 to 127."""

    def quantized(self, W):
        scale = W.abs().amax(1, keepdim=True) / 127
        return (W / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8), scale

    def layout(self, shape):
        return self.of(shape, codes=("int8", shape), scale=("float32", (shape[0], 1)))

    def decode(self, packed, rows):
        codes, scale = (packed.tensors[name][slice(*rows)] for name in ("codes", "scale"))
        return codes.float() * scale


class Floating(PerRow):
    """Floats of 8 bits with 3 bits of mantissa, and a power of two for each row."""

    def quantized(self, W):
        largest = W.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, (largest / 448).log2().ceil().exp2(), 1.0)
        return (W / scale).to(torch.float8_e4m3fn), scale

    def layout(self, shape):
        return self.of(shape, codes=("float8_e4m3fn", shape), scale=("float32", (shape[0], 1)))


class Lattice(PerRow):
    """Points of the lattice D2: pairs of whole numbers with an even sum, at a step for each row."""

    def quantized(self, W):
        scale = W.abs().amax(1, keepdim=True) / 126
        pairs = (W / torch.where(scale > 0, scale, 1.0)).view(len(W), -1, 2)
        whole = pairs.round()
        error = pairs - whole
        worse = torch.nn.functional.one_hot(error.abs().argmax(2), 2)  # the coordinate to move
        odd = whole.sum(2, keepdim=True).remainder(2)
        direction = torch.where(error < 0, -1.0, 1.0)
        return (whole + odd * worse * direction).view(W.shape).to(torch.int8), scale


class Rotated(PerRow):
    """Columns are turned by signs and a Hadamard matrix of 2, so a row of Ŵ is a sum."""

    def prepared(self, weight):
        sign = signs(0, weight.shape[1]).to(weight.device)
        return self.turned(super().prepared(weight) * sign)

    def turned(self, x):
        pairs = x.unflatten(-1, (-1, 2))
        low, high = pairs[..., 0], pairs[..., 1]
        return torch.stack([low + high, low - high], dim=-1).flatten(-2) * 0.5**0.5

    def dequantize_tile(self, packed, rows, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        turned = super().dequantize_tile(packed, rows, torch.float32).to(wide)
        sign = signs(0, packed.shape[1]).to(packed.device)
        return (self.turned(turned) * sign).to(dtype)


class _KernelsPerRow(KernelQuantizer):
    """A toolkit's quantizer with the tensors of ``PerRow``."""

    kernels = "modulora_zoo"  # it has none

    @staticmethod
    @lru_cache(maxsize=64)
    def tensors(shape):
        codes = TensorLayout("int8", shape)
        return {"codes": codes, "scale": TensorLayout("float32", (shape[0], 1))}

    def reference_tile(self, packed, rows):
        codes, scale = (packed.tensors[name][slice(*rows)] for name in ("codes", "scale"))
        return codes.float() * scale


class RotatedKernels(_KernelsPerRow):
    """A toolkit's quantizer whose rows are turned by a Hadamard matrix, as the docs show it."""

    spec = SPECS["RotatedKernels"]

    def pack(self, weight, calibration=None):
        found = PerRow().pack(rotate(weight.detach().float(), self.signs(weight)))
        return self.layout(tuple(weight.shape)).fill(found.tensors)

    def signs(self, weight):
        return random_signs(0, weight.shape[1], "input").to(weight.device, torch.float16)

    def matmul(self, x, packed, transpose=False):
        if x.shape[-1:] != (packed.shape[0 if transpose else 1],):
            return super().matmul(x, packed, transpose)
        wide, s = torch.promote_types(x.dtype, torch.float32), self.signs(packed)
        if transpose:
            y = super().matmul(x.to(wide), packed, True)
            return rotate(y, s, after=True, transpose=True, dtype=wide).to(x.dtype)
        return super().matmul(rotate(x.to(wide), s, dtype=wide), packed).to(x.dtype)

    def dequantize_tile(self, packed, rows, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        C = super().dequantize_tile(packed, rows, wide)
        if C.numel() == 0:
            return C.to(dtype)
        return rotate(C, self.signs(packed), after=True, transpose=True, dtype=wide).to(dtype)


class Microscaled(_TwoTensors):
    """MXFP4 as its specification has it: blocks of 32, E8M0 scales of which 255 is NaN, E2M1."""

    LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def check_shape(self, shape):
        super().check_shape(shape)
        if shape[1] % 32:
            raise ShapeError(f"{self.spec.name}: in_features {shape[1]} is not a multiple of 32")

    def quantized(self, W):
        blocks = W.unflatten(1, (-1, 32))
        largest = blocks.abs().amax(2).clamp(min=2.0**-120)
        exponent = (largest.log2().floor() - 2).clamp(-127, 124)
        P = blocks / exponent.exp2()[..., None]
        levels = torch.tensor(self.LEVELS, dtype=torch.float32, device=W.device)
        code = torch.bucketize(P.abs(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        code |= (P < 0).to(torch.uint8) << 3
        code = code.flatten(1)
        return code[:, ::2] | code[:, 1::2] << 4, (exponent + 127).to(torch.uint8)

    def layout(self, shape):
        codes, scale = ((shape[0], shape[1] // n) for n in (2, 32))
        return self.of(shape, codes=("uint8", codes), scale=("uint8", scale))

    def decode(self, packed, rows):
        levels = torch.tensor(self.LEVELS, dtype=torch.float32, device=packed.device)
        code = self.codes(packed, rows)
        P = levels[(code & 7).long()] * (1 - 2 * (code >> 3).float())
        X = packed.tensors["scale"][slice(*rows)].float()
        X = torch.where(X == 255, torch.nan, (X - 127).exp2())
        return (P.unflatten(1, (-1, 32)) * X[..., None]).flatten(1)


class Experts(_KernelsPerRow):
    """A toolkit's quantizer whose rows are gathered and joined: layers of experts become stacks."""

    spec = SPECS["Experts"]
    row_tensors = ("codes", "scale")

    def pack(self, weight, calibration=None):
        found = PerRow().pack(weight)
        return self.layout(found.shape).fill(found.tensors)
