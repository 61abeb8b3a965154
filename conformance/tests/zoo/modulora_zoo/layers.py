"""Sound quantizers under broken layers: a fault in each term of the backward, and in its memory.

A layer of each class replaces the core's ``lora_linear`` in the kit. It is an autograd.Function,
as one would write it by hand; ``OwnFunction`` is right.
"""

from typing import ClassVar

import torch
from torch.nn import functional as F

from modulora_core.layers import LoRALinear
from modulora_zoo.healthy import Healthy

GRADIENTS = "test_output_and_gradients_equal_those_of_the_dense_layer"
KIT = "modulora_conformance"
LINEAR = F.linear  # its class replaces it


def lora_linear(x, weight, bias=None, A=None, B=None, *, scale=1.0, dropout=0.0, **scales):
    """The layer of the quantizer's class, with the arguments of the core's."""
    quantizer, packed = weight.quantizer, weight.packed
    u, v = scales.get("input_scale"), scales.get("output_scale")
    given = x if u is None else x * u
    y = _Product.apply(given, quantizer, packed)
    y = y if v is None else y * v
    dropped = quantizer.drop(x, dropout) if dropout else x
    y = y if A is None else y + _Adapter.apply(dropped, A, B, scale, quantizer)
    y = y if bias is None else y + quantizer.bias(bias)
    return quantizer.result(y, x)


class _Product(torch.autograd.Function):
    """X Ŵᵀ."""

    @staticmethod
    def forward(ctx, x, quantizer, packed):
        ctx.rest = quantizer, packed
        quantizer.before(ctx, x, packed)
        return quantizer.matmul(x, packed)

    @staticmethod
    def backward(ctx, dY):
        quantizer, packed = ctx.rest
        quantizer.after(ctx, dY)
        return quantizer.product_gradient(dY, packed), None, None


class _Adapter(torch.autograd.Function):
    """s (X Aᵀ) Bᵀ."""

    @staticmethod
    def forward(ctx, x, A, B, s, quantizer):
        ctx.save_for_backward(x, A, B)
        ctx.rest = s, quantizer
        quantizer.note(ctx, x, A, B)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, A, B = (t.to(wide) for t in (x, A, B))
        return s * (x @ A.T) @ B.T

    @staticmethod
    def backward(ctx, dY):
        s, quantizer = ctx.rest
        operands = quantizer.saved(ctx)
        dtypes = [t.dtype for t in operands]
        wide = torch.promote_types(operands[0].dtype, torch.float32)
        x, A, B, dY = (t.to(wide) for t in (*operands, dY))
        leading = x.shape[:-1]
        x, dY = x.reshape(-1, x.shape[-1]), dY.reshape(-1, dY.shape[-1])
        dX, dA, dB = quantizer.gradients(x, A, B, dY, s)
        found = (dX.view(*leading, -1), dA, dB)
        return *(g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)), None, None


class OwnFunction(Healthy):
    """Sound. The others override one step of it."""

    patches: ClassVar = {
        f"{KIT}.problems.lora_linear": lora_linear,
        f"{KIT}.levels.memory.lora_linear": lora_linear,
    }

    def gradients(self, x, A, B, dY, s):
        return s * (dY @ B) @ A, s * (dY @ B).T @ x, s * dY.T @ (x @ A.T)

    def product_gradient(self, dY, packed):
        return self.matmul(dY, packed, True)

    def before(self, ctx, x, packed):
        pass

    def after(self, ctx, dY):
        pass

    def note(self, ctx, x, A, B):
        pass

    def saved(self, ctx):
        return ctx.saved_tensors

    def drop(self, x, p):
        return torch.native_dropout(x, p, True)[0]

    def bias(self, bias):
        return bias

    def result(self, y, x):
        return y.to(x.dtype)


class _Wrong(OwnFunction):
    breaks = GRADIENTS


class WrongSignOfDX(_Wrong):
    def product_gradient(self, dY, packed):
        return -super().product_gradient(dY, packed)


class NoGradientThroughTheWeight(_Wrong):
    """It takes the frozen weight for a constant."""

    def product_gradient(self, dY, packed):
        return torch.zeros_like(super().product_gradient(dY, packed))


class TransposedTileInTheBackward(_Wrong):
    """A square weight is multiplied as it is."""

    def product_gradient(self, dY, packed):
        right = super().product_gradient(dY, packed)
        whole = self.dequantize_tile(packed, (0, packed.shape[0]), torch.float64)
        side = min(packed.shape)
        square = dY[..., :side].double() @ whole[:side, :side].T
        return torch.cat([square, right[..., side:].double()], dim=-1).to(dY.dtype)


class NoGradientThroughTheAdapter(_Wrong):
    def gradients(self, x, A, B, dY, s):
        dX, dA, dB = super().gradients(x, A, B, dY, s)
        return 0 * dX, dA, dB


class UnscaledDX(_Wrong):
    def gradients(self, x, A, B, dY, s):
        dX, dA, dB = super().gradients(x, A, B, dY, s)
        return dX / s, dA, dB


class UnscaledDA(_Wrong):
    def gradients(self, x, A, B, dY, s):
        dX, dA, dB = super().gradients(x, A, B, dY, s)
        return dX, dA / s, dB


class UnscaledDB(_Wrong):
    def gradients(self, x, A, B, dY, s):
        dX, dA, dB = super().gradients(x, A, B, dY, s)
        return dX, dA, dB / s


class WrongSignOfDA(_Wrong):
    def gradients(self, x, A, B, dY, s):
        dX, dA, dB = super().gradients(x, A, B, dY, s)
        return dX, -dA, dB


class DBOfTheLastToken(_Wrong):
    def gradients(self, x, A, B, dY, s):
        dX, dA, _ = super().gradients(x, A, B, dY, s)
        return dX, dA, s * dY[-1:].T @ (x[-1:] @ A.T)


class StaleA(_Wrong):
    """The backward has the first A of each shape."""

    kept: ClassVar = {}

    def saved(self, ctx):
        x, A, B = ctx.saved_tensors
        return x, self.kept.setdefault((A.shape, A.dtype), A.detach().clone()), B


class FrozenBias(_Wrong):
    def bias(self, bias):
        return bias.detach() + 0 * bias


class GradientsInHalf(_Wrong):
    """It rounds dY to fp16."""

    def product_gradient(self, dY, packed):
        return super().product_gradient(dY.half(), packed).to(dY.dtype)


class FreesWhatItSaved(OwnFunction):
    """The backward writes its dX over the saved x."""

    breaks = "test_a_second_backward_gives_the_same_gradients"

    def gradients(self, x, A, B, dY, s):
        found = super().gradients(x, A, B, dY, s)
        if x.dtype == torch.float32:
            x.detach().data.zero_()
        return found


class SavesNoVersions(OwnFunction):
    """It keeps A and B in its context, beside what autograd saves."""

    breaks = "test_a_parameter_written_before_the_backward_is_noticed"

    def note(self, ctx, x, A, B):
        ctx.save_for_backward(x)
        ctx.adapter = A, B

    def saved(self, ctx):
        return *ctx.saved_tensors, *ctx.adapter


class LeavesAutocastsDtype(OwnFunction):
    """Under autocast its result is bf16."""

    breaks = "test_autocast_only_rounds"

    def result(self, y, x):
        return y.bfloat16() if torch.is_autocast_enabled("cpu") else super().result(y, x)


class RecomputesWithOtherDropout(OwnFunction):
    """It draws dropout from a generator of its own, which checkpointing does not restore."""

    breaks = "test_gradient_checkpointing_changes_no_bit"
    generator = torch.Generator().manual_seed(0)

    def drop(self, x, p):
        kept = torch.rand(x.shape, generator=self.generator) >= p
        return x * kept / (1 - p)


class SavesTheWeight(OwnFunction):
    """It saves a dense weight for the backward."""

    breaks = "test_autograd_saves_no_weight"

    def before(self, ctx, x, packed):
        ctx.save_for_backward(self.decode(packed, (0, packed.shape[0])))


class DenseInTheContext(OwnFunction):
    """It keeps a dense weight in the context, where autograd does not see it."""

    breaks = "test_peak_memory_is_tiles_and_activations"

    def before(self, ctx, x, packed):
        ctx.weight = self.decode(packed, (0, packed.shape[0]))


class GradientOfTheWeight(OwnFunction):
    """A closure keeps a dense dW."""

    breaks = "test_peak_memory_is_tiles_and_activations"
    hooks: ClassVar = []

    def before(self, ctx, x, packed):
        ctx.x = x.detach()

    def after(self, ctx, dY):
        dW = dY.reshape(-1, dY.shape[-1]).T @ ctx.x.reshape(-1, ctx.x.shape[-1])
        self.hooks[:] = [lambda: dW]


class HookHoldsTheInput(OwnFunction):
    """A hook on the output holds the input after the backward."""

    breaks = "test_nothing_is_kept_after_a_call"
    hooks: ClassVar = []

    def before(self, ctx, x, packed):
        if x.shape[-1] == 512:
            self.hooks.append(lambda: x)


class DecidesByValues(OwnFunction):
    """It skips the product of an input of zeros, which a trace cannot know."""

    breaks = "test_a_layer_runs_on_fake_tensors"

    def before(self, ctx, x, packed):
        if x.numel() and float(x.detach().abs().max()) == 0:
            ctx.zeros = True


class OffByOneExpert(Healthy):
    """Its stack gives the expert before."""

    breaks = "test_experts_keep_apart"

    @staticmethod
    def stack(matrices):
        kept = list(matrices)
        return [kept[max(0, i - 1)] for i in range(len(kept))]

    patches: ClassVar = {f"{KIT}.levels.gradients.PackedStack": stack}


class HeadWithoutGradient(Healthy):
    """A tied head multiplies a copy of its input without a graph."""

    breaks = "test_a_tied_table_reads_and_multiplies_alike"

    @staticmethod
    def linear(x, weight, bias=None):
        return LINEAR(x.detach() if len(x) == 4 else x, weight, bias) + 0 * x.sum()

    patches: ClassVar = {f"{KIT}.levels.gradients.linear": linear}


class _Compiled(LoRALinear):
    def forward(self, x):
        return super().forward(x) * (1.01 if torch.compiler.is_compiling() else 1)


class OtherWhenCompiled(Healthy):
    breaks = "test_a_compiled_layer_gives_the_eager_results"
    patches: ClassVar = {f"{KIT}.levels.devices.LoRALinear": _Compiled}
