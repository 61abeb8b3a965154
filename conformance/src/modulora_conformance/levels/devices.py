"""L7: devices, ``torch.compile``, and Triton kernels in the interpreter give the same results."""

from __future__ import annotations

import importlib.util
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from modulora_conformance.cases import (
    DTYPES,
    both_ways,
    fit,
    gaussian,
    inputs,
    pack,
    packed,
    tile,
)
from modulora_conformance.checks import Level, needs
from modulora_conformance.elsewhere import elsewhere, name_of, request, results
from modulora_conformance.levels.accuracy import END, MARGIN, WIDTHS, usual_error
from modulora_conformance.levels.gradients import GRADIENTS, check_layer
from modulora_conformance.levels.packing import DETERMINISTIC
from modulora_conformance.levels.persistence import REGISTERED
from modulora_conformance.levels.processes import READS
from modulora_conformance.levels.products import FORWARD, TRANSPOSED
from modulora_conformance.levels.tiles import OWNED
from modulora_conformance.oracle import dense, product_error, relative_error, tile_error
from modulora_conformance.problems import SCALE, output, problem
from modulora_conformance.results import HARDWARE, NOT_OFFERED, Measurements
from modulora_conformance.tolerances import GRADIENT, PRODUCT, ROUNDING
from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.packed_parameters import PackedParameter
from modulora_core.spec import PackedWeight, Quantizer

RAGGED = (37, 52)
"""Before it is made to fit: no multiple of a block of threads."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Devices(Level):
    """Every device gives the same results: plain torch runs where a quantizer has no kernel.

    Checks for missing hardware are skipped.
    """

    level, title = "L7", "devices"

    def test_cuda_gives_the_tiles_of_the_cpu(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: the GPU decodes other values, so that it trains another model."""
        _require_cuda()
        weight = packed(quantizer, RAGGED)
        exact, on_cuda = tile(quantizer, weight), weight.to("cuda")
        for dtype in DTYPES:
            found = tile(quantizer, on_cuda, dtype)
            assert found.device.type == "cuda", f"tile: expected it on CUDA, got {found.device}"
            assert found.dtype == dtype, f"tile: expected {dtype}, got {found.dtype}"
            # the same bits, except that a rotation sums in another order
            limit = ROUNDING[dtype].value + PRODUCT[torch.float32].value
            error = tile_error(found.cpu(), exact)
            measurements.at_most(f"tile on CUDA in {dtype}", error, limit)
            assert torch.equal(tile(quantizer, on_cuda, dtype, 1), found[1:]), (
                f"rows from 1 in {dtype}: expected the bits of the whole, got others"
            )

    def test_cuda_gives_the_products_and_gradients_of_the_dense_layer(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails, though levels 3 and 4 pass: the GPU's kernel is wrong.

        Or a tensor stays on the CPU.
        """
        _require_cuda()
        weight = packed(quantizer, RAGGED)
        W, on_cuda = dense(quantizer, weight), weight.to("cuda")
        for dtype, rows in itertools.product(DTYPES, (1, 3, 70)):
            given = problem(weight.shape, dtype, rows=(rows,), seed=rows)
            for transpose, x in ((False, given.x), (True, given.dY)):
                y = quantizer.matmul(x.to("cuda"), on_cuda, transpose)
                assert y.device.type == "cuda", f"product: expected it on CUDA, got {y.device}"
                error, limit = product_error(y.cpu(), x, W, transpose), PRODUCT[dtype]
                case = f"{rows} rows, {transpose=}; {limit.reason}"
                measurements.at_most(f"product on CUDA in {dtype}", error, limit.value, case=case)
            check_layer(quantizer, weight, given, W, measurements, f"{rows} rows; ", "cuda")

    @needs(FORWARD, TRANSPOSED, OWNED, WIDTHS)
    def test_the_meta_device_gives_shapes_and_dtypes(self, quantizer: Quantizer) -> None:
        """If this fails: reading needs a tensor that stays on the CPU, or the value of one.

        On a GPU such a table raises an error, or is copied for each product. Move tables to
        ``packed.device``, with the device in a cache's key, and decide by shapes and metadata.
        """
        weight = packed(quantizer, RAGGED)
        before, on_meta = tile(quantizer, weight), weight.to("meta")
        results = [(tile(quantizer, on_meta, t, 1, 4), (3, weight.shape[1]), t) for t in DTYPES]
        for transpose, x in both_ways(weight, 3):
            y = quantizer.matmul(x.to("meta"), on_meta, transpose)
            results.append((y, (3, weight.shape[1 if transpose else 0]), x.dtype))
        for found, shape, dtype in results:
            got = (found.device.type, tuple(found.shape), found.dtype)
            assert got == ("meta", shape, dtype), f"expected {('meta', shape, dtype)}, got {got}"
        assert torch.equal(tile(quantizer, weight), before), (
            "after reading on the meta device: expected the same Ŵ on the CPU, got another"
        )
        dense_weight = gaussian(fit(quantizer, 39, 54), 35)  # of no other check: nothing is cached
        weight = pack(quantizer, dense_weight)
        tile(quantizer, weight.to("meta"))
        error = relative_error(tile(quantizer, weight), dense_weight)
        assert error <= END * usual_error(quantizer) + MARGIN, (
            f"read on the meta device first: expected a usual error on the CPU, got {error:.3g}"
        )

    @needs(DETERMINISTIC)
    def test_a_weight_without_values_is_refused(self, quantizer: Quantizer) -> None:
        """If this fails: a weight on the meta device is packed, though it has no values.

        A skeleton that was not filled would become a model. Reading a value raises an error:
        `weight.isfinite().all()` in an `if` is enough.
        """
        shape = fit(quantizer, 16, 80)
        with pytest.raises(Exception):  # noqa: B017  # torch's and the plugin's both say it
            pack(quantizer, torch.empty(shape, device="meta"))

    @needs(GRADIENTS)
    def test_a_layer_runs_on_fake_tensors(self, quantizer: Quantizer) -> None:
        """If this fails: the layer cannot be traced: it reads values or addresses of tensors.

        `torch.compile` and `torch.export` run it on fake tensors first, which have shapes alone.
        """
        weight = packed(quantizer, RAGGED)
        given = problem(weight.shape, torch.float32)
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(t) for name, t in weight.tensors.items()}
            leaves = {n: mode.from_tensor(t).requires_grad_() for n, t in given.operands.items()}
            y = output(quantizer, weight.layout.fill(fakes), leaves)
            y.backward(mode.from_tensor(given.dY))
        assert y.shape == given.dY.shape, f"expected {given.dY.shape}, got {y.shape}"
        for name, leaf in leaves.items():
            assert leaf.grad is not None, f"d{name}: expected a gradient, got none"
            assert leaf.grad.shape == leaf.shape, f"d{name}: expected {leaf.shape}, got another"

    @needs(GRADIENTS)
    def test_a_compiled_layer_gives_the_eager_results(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: under ``torch.compile`` the layer computes something else, or breaks the
        graph.

        The compiler must treat the quantizer's product as one operation.
        """
        weight = packed(quantizer, (32, 64))
        eager, twin = _Block(quantizer, weight), _Block(quantizer, weight)
        # aot_eager omits the last step alone, which needs a C++ compiler
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        x, dY = (inputs((3,), n, torch.float32, 1) for n in reversed(weight.shape))
        outcomes = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for module, block in ((eager, eager), (compiled, twin)):
                leaf = x.clone().requires_grad_()
                y = module(leaf)
                y.backward(dY)
                trained = ((n, p) for n, p in block.named_parameters() if p.requires_grad)
                gradients = {f"d{name}": p.grad for name, p in trained}
                outcomes.append({"output": y, "dx": leaf.grad} | gradients)
        torch.compiler.reset()
        warned = [str(w.message).partition("\n")[0] for w in caught if "_dynamo" in w.filename]
        assert not warned, f"torch.compile: expected no warning, got: {warned[0]}"
        expected, found = outcomes
        for name, exact in expected.items():
            assert exact is not None
            assert found[name] is not None, f"compiled {name}: expected a gradient, got none"
            error = relative_error(found[name], exact)
            measurements.at_most(f"compiled {name}", error, GRADIENT[torch.float32].value)

    @needs(REGISTERED, READS)
    def test_interpreted_triton_kernels_give_the_dense_products(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: a Triton kernel computes something else than the reference.

        With ``TRITON_INTERPRET=1`` in the environment, a quantizer that names ``"cuda"`` in its
        spec runs its Triton kernels on CPU tensors too. A test then needs no GPU."""
        if "cuda" not in quantizer.spec.devices:
            pytest.skip(f"{NOT_OFFERED}spec.devices names no cuda")
        if importlib.util.find_spec("triton") is None:
            pytest.skip("missing package: triton interprets the kernels; pip install triton")
        weight = packed(quantizer, RAGGED)
        W, exact = dense(quantizer, weight), tile(quantizer, weight)
        asked = request(quantizer, weight, *KERNEL_DTYPES)
        (found,) = elsewhere(results, [asked], TRITON_INTERPRET="1")
        for dtype in KERNEL_DTYPES:
            of = name_of(dtype)
            limit = ROUNDING[dtype].value + PRODUCT[torch.float32].value
            error = tile_error(found[f"tile.{of}"], exact)
            measurements.at_most(f"interpreted tile in {dtype}", error, limit)
            for product, operand in (("product", "x"), ("transposed", "dY")):
                x, y = asked.inputs[f"{operand}.{of}"], found[f"{product}.{of}"]
                error = product_error(y, x, W, transpose=product == "transposed")
                name, limit = f"interpreted {product} in {dtype}", PRODUCT[dtype].value
                measurements.at_most(name, error, limit)


class _Block(nn.Module):
    """An adapted layer between operations that the compiler compiles."""

    def __init__(self, quantizer: Quantizer, weight: PackedWeight) -> None:
        super().__init__()
        bias = nn.Parameter(inputs((), weight.shape[0], torch.float32, 3))
        self.layer = LoRALinear(QuantLinear(PackedParameter(quantizer, weight), bias))
        self.layer.add_adapter("default", 2, alpha=2 * SCALE)
        with torch.no_grad():
            for i, p in enumerate(self.layer.parameters_of("default").values()):
                p.copy_(inputs((p.shape[0],), p.shape[1], torch.float32, 4 + i))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.layer(x * 0.5)) + 1.0
        return y


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{HARDWARE}no CUDA device")
