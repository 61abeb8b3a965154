"""L7: devices.

Every quantizer works on every device that torch has, by plain torch where it has no kernel. What isn't here is skipped and says so.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modulora_conformance import oracle
from modulora_conformance.another_process import inputs_for, read_elsewhere
from modulora_conformance.cases import DTYPES, inputs, packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.problems import SCALE, gradients, output, problem
from modulora_conformance.results import HARDWARE, NOT_OFFERED
from modulora_conformance.tolerances import GRADIENT, PRODUCT, ROUNDING
from modulora_core.layers import LoRALinear, PackedParameter, QuantLinear
from modulora_core.spec import PackedWeight, Quantizer

RAGGED = (37, 52)
"""Before it is made to fit: no multiple of a block of threads."""

REGISTERED = "test_the_spec_is_registered_by_an_entry_point"
GRADIENTS = "test_output_and_gradients_equal_those_of_the_dense_layer"
ELSEWHERE = "test_another_process_reads_the_same_weight"

ROWS = (1, 3, 70)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Devices(Level):
    level, title = "L7", "devices"

    def test_cuda_gives_the_tiles_of_the_cpu(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: a model finetuned on a GPU isn't the one that is evaluated on a CPU: the GPU's path decodes other values."""
        _require_cuda()
        weight = packed(quantizer, RAGGED)
        rows = (0, weight.shape[0])
        exact = quantizer.dequantize_tile(weight, rows, torch.float32)
        on_cuda = weight.to("cuda")
        for dtype in DTYPES:
            tile = quantizer.dequantize_tile(on_cuda, rows, dtype)
            assert tile.device.type == "cuda", (
                f"tile: expected it on the device of the packed weight, got {tile.device}"
            )
            assert tile.dtype == dtype, f"tile: expected {dtype}, got {tile.dtype}"
            # the same bits where values are looked up and scaled; a rotation sums, in another order
            limit = ROUNDING[dtype].value + PRODUCT[torch.float32].value
            error = float((tile.cpu().double() - exact.double()).abs().max() / exact.abs().max())
            measurements.at_most(f"tile on CUDA in {dtype}", error, limit)
            part = quantizer.dequantize_tile(on_cuda, (1, rows[1]), dtype)
            assert torch.equal(part, tile[1:]), (
                f"rows 1 to {rows[1]} in {dtype}: expected the bits of the whole, got others"
            )

    def test_cuda_gives_the_products_and_gradients_of_the_dense_layer(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails though levels 3 and 4 pass: the GPU's kernel, or a tensor that stays on the CPU."""
        _require_cuda()
        weight = packed(quantizer, RAGGED)
        W = oracle.dense(quantizer, weight)
        on_cuda = weight.to("cuda")
        for dtype in DTYPES:
            for rows in ROWS:
                given = problem(weight.shape, dtype, rows=(rows,), seed=rows)
                for transpose, x in ((False, given.x), (True, given.dY)):
                    y = quantizer.matmul(x.to("cuda"), on_cuda, transpose)
                    assert y.device.type == "cuda", (
                        f"product: expected it on x's device, got {y.device}"
                    )
                    error = oracle.product_error(y.cpu(), x, W, transpose)
                    case = f"{rows} rows, transpose={transpose}; {PRODUCT[dtype].reason}"
                    measurements.at_most(
                        f"product on CUDA in {dtype}", error, PRODUCT[dtype].value, case=case
                    )
                there = given.to("cuda")
                leaves = there.leaves()
                output(quantizer, on_cuda, leaves).backward(there.dY)
                for name, gradient in gradients(leaves).items():
                    assert gradient is not None, f"d{name} on CUDA: expected a gradient, got none"
                    error = given.error(name, gradient.cpu(), W)
                    measurements.at_most(
                        f"d{name} on CUDA in {dtype}",
                        error,
                        GRADIENT[dtype].value,
                        case=f"{rows} rows",
                    )

    @needs(GRADIENTS)
    def test_a_compiled_layer_gives_the_eager_results(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: under ``torch.compile`` the layer computes something else, or the compiler looks into the quantizer, which it
        should take as one step: its warnings say where.
        """
        eager = _Block(quantizer, packed(quantizer, (32, 64)))
        compiled = copy.deepcopy(eager)
        # aot_eager is the compiler but for the last step, which is the same for every model and takes a C++ compiler and long
        run = torch.compile(compiled, backend="aot_eager")
        given = inputs((3,), eager.layer.in_features, torch.float32, 1)
        x, z = given.clone().requires_grad_(), given.clone().requires_grad_()
        expected = eager(x)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            y = run(z)
        dY = inputs((3,), eager.layer.out_features, torch.float32, 2)
        expected.backward(dY)
        y.backward(dY)
        said = [str(w.message).partition("\n")[0] for w in told if "_dynamo" in w.filename]
        assert not said, f"torch.compile: expected no warning, got: {said[0]}"
        limit = GRADIENT[torch.float32].value
        measurements.at_most("compiled output", oracle.relative_error(y, expected), limit)
        own = {"x": (z, x)} | {
            name: (parameter, dict(eager.named_parameters())[name])
            for name, parameter in compiled.named_parameters()
        }
        for name, (found, exact) in own.items():
            assert exact.grad is not None
            assert found.grad is not None, (
                f"d{name}: expected a gradient from the compiled layer, got none"
            )
            measurements.at_most(
                f"compiled d{name}", oracle.relative_error(found.grad, exact.grad), limit
            )
        torch._dynamo.reset()

    @needs(REGISTERED, ELSEWHERE)
    def test_interpreted_triton_kernels_give_the_dense_products(
        self, quantizer: Quantizer, measurements: Measurements, tmp_path: Path
    ) -> None:
        """If this fails: a Triton kernel computes something else than the reference. With ``TRITON_INTERPRET=1`` in the environment a
        quantizer that names ``"cuda"`` in its spec runs its Triton kernels on CPU tensors too, so that they are tested without a GPU.
        """
        if "cuda" not in quantizer.spec.devices:
            pytest.skip(f"{NOT_OFFERED}spec.devices names no cuda")
        if importlib.util.find_spec("triton") is None:
            pytest.skip(
                "missing package: triton, in whose interpreter the kernels run; pip install triton"
            )
        weight = packed(quantizer, RAGGED)
        W = oracle.dense(quantizer, weight)
        exact = quantizer.dequantize_tile(weight, (0, weight.shape[0]), torch.float32)
        given = inputs_for(weight.shape, KERNEL_DTYPES)
        found = read_elsewhere(quantizer, weight, given, tmp_path, {"TRITON_INTERPRET": "1"})
        for dtype in KERNEL_DTYPES:
            name = str(dtype).removeprefix("torch.")
            error = float(
                (found[f"tile.{name}"].double() - exact.double()).abs().max() / exact.abs().max()
            )
            limit = ROUNDING[dtype].value + PRODUCT[torch.float32].value
            measurements.at_most(f"interpreted tile in {dtype}", error, limit)
            for result, operand, transpose in (("product", "x", False), ("transposed", "dY", True)):
                error = oracle.product_error(
                    found[f"{result}.{name}"], given[f"{operand}.{name}"], W, transpose
                )
                measurements.at_most(
                    f"interpreted {result} in {dtype}", error, PRODUCT[dtype].value
                )


class _Block(nn.Module):
    """An adapted layer between operations that the compiler does compile."""

    def __init__(self, quantizer: Quantizer, weight: PackedWeight) -> None:
        super().__init__()
        bias = nn.Parameter(inputs((), weight.shape[0], torch.float32, 3))
        self.layer = LoRALinear(QuantLinear(PackedParameter(quantizer, weight), bias))
        self.layer.add_adapter("default", 2, alpha=2 * SCALE)
        with torch.no_grad():
            for i, parameter in enumerate(self.layer.parameters_of("default").values()):
                parameter.copy_(
                    inputs(tuple(parameter.shape[:1]), parameter.shape[1], torch.float32, 4 + i)
                )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.layer(x * 0.5)) + 1.0
        return y


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{HARDWARE}no CUDA device")
