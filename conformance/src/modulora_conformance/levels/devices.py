"""L7: devices, ``torch.compile``, and Triton kernels in the interpreter give the same results."""

from __future__ import annotations

import importlib.util
import itertools
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import modulora_kernels as kernels
import pytest
import torch
from modulora_kernels import compiled
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from modulora_conformance.cases import (
    DTYPES,
    both_ways,
    fit,
    gaussian,
    identity,
    inputs,
    pack,
    packed,
    tile,
)
from modulora_conformance.checks import Level, needs
from modulora_conformance.elsewhere import (
    elsewhere,
    name_of,
    request,
    results,
    without_numba_results,
)
from modulora_conformance.fake_device import OnCuda, fake_cuda, moved
from modulora_conformance.levels.accuracy import END, MARGIN, WIDTHS, usual_error
from modulora_conformance.levels.gradients import GRADIENTS, check_layer
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.packing import DETERMINISTIC
from modulora_conformance.levels.persistence import REGISTERED
from modulora_conformance.levels.processes import READS
from modulora_conformance.levels.products import FORWARD, TRANSPOSED
from modulora_conformance.levels.tiles import OWNED
from modulora_conformance.oracle import dense, product_error, relative_error, tile_error
from modulora_conformance.problems import SCALE, output, problem
from modulora_conformance.results import HARDWARE, NOT_OFFERED
from modulora_conformance.tolerances import GRADIENT, PRODUCT, ROUNDING
from modulora_core.layers import LoRALinear, QuantLinear
from modulora_core.packed_parameters import PackedParameter
from modulora_core.spec import Calibration, PackedWeight, Quantizer

RAGGED = (37, 52)
"""Before it is made to fit: no multiple of a block of threads."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

META = "test_the_meta_device_gives_shapes_and_dtypes"
VALUES = "test_a_device_without_kernels_gives_the_values_of_the_cpu"

SHAPE = (43, 116)


TORCHS = ("aten", "prim", "prims", "quantized", "mkldnn", "modulora")
"""Namespaces of operations that no plugin registers."""


class _Registered(TorchDispatchMode):
    """Notes the first call of each operation that a plugin registers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in TORCHS and str(func) not in self.calls:
            copied = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, (args, kwargs))
            self.calls[str(func)] = func, copied[0], copied[1] or {}
        return func(*args, **(kwargs or {}))


class Devices(Level):
    """Every device gives the same results: plain torch runs where a quantizer has no kernel.

    Checks for missing hardware are skipped.
    """

    level, title = "L7", "devices"

    def test_cuda_gives_the_tiles_of_the_cpu(self, quantizer, measurements):
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
        self, quantizer, measurements
    ):
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
    def test_the_meta_device_gives_shapes_and_dtypes(self, quantizer):
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
    def test_a_weight_without_values_is_refused(self, quantizer):
        """If this fails: a weight on the meta device is packed, though it has no values.

        A skeleton that was not filled would become a model. Reading a value raises an error:
        `weight.isfinite().all()` in an `if` is enough.
        """
        shape = fit(quantizer, 16, 80)
        with pytest.raises(Exception):  # noqa: B017  # torch's and the plugin's both say it
            pack(quantizer, torch.empty(shape, device="meta"))

    @needs(GRADIENTS)
    def test_a_layer_runs_on_fake_tensors(self, quantizer):
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
    def test_a_compiled_layer_gives_the_eager_results(self, quantizer, measurements):
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

    @needs(FORWARD, TRANSPOSED, LOOKUP)
    def test_registered_operations_are_as_they_say(self, quantizer):
        """If this fails: an operation that the plugin registers with torch has a wrong schema.

        It writes to an argument that the schema does not name, or its fake version gives other
        shapes. `torch.library.opcheck` says which.
        """
        found = packed(quantizer, SHAPE)
        with _Registered() as registered:
            tile(quantizer, found)
            quantizer.lookup(torch.tensor([2, 0]), found, torch.float32)
            for rows in (1, 40):
                for transpose, x in both_ways(found, rows):
                    quantizer.matmul(x, found, transpose)
        if not registered.calls:
            pytest.skip(f"{NOT_OFFERED}it registers no operation")
        for func, args, kwargs in registered.calls.values():
            try:
                torch.library.opcheck(
                    func, args, kwargs, test_utils=("test_schema", "test_faketensor")
                )
            except Exception as error:
                pytest.fail(f"{func}: {error}", pytrace=False)

    @needs(REGISTERED, READS)
    def test_interpreted_triton_kernels_give_the_dense_products(self, quantizer, measurements):
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

    @needs(META, FORWARD, TRANSPOSED, LOOKUP, OWNED, WIDTHS)
    def test_a_device_without_kernels_gives_the_values_of_the_cpu(
        self, quantizer, measurements, monkeypatch
    ):
        """If this fails: on a device that says it is CUDA, plain torch gives other values, or
        mixes devices.

        The device is a fake whose values are in the CPU's memory; kernels of the toolkit are off.
        Make each new tensor on ``packed.device`` or ``weight.device``.
        """
        without_kernels(monkeypatch)
        weight = packed(quantizer, SHAPE)
        W, whole, ids = dense(quantizer, weight), tile(quantizer, weight), torch.tensor([[9, 0, 3]])
        with on_fake_cuda(quantizer):
            on_cuda = weight.layout.fill({n: moved(t) for n, t in weight.tensors.items()})
            for dtype in DTYPES:
                found = _values(tile(quantizer, on_cuda, dtype, 1), f"a tile in {dtype}")
                limit = ROUNDING[dtype].value + PRODUCT[torch.float32].value
                error = tile_error(found, whole[1:])
                measurements.at_most(f"tile on another device in {dtype}", error, limit)
            rows = _values(quantizer.lookup(moved(ids), on_cuda, torch.float32), "a lookup")
            error, limit = tile_error(rows, whole[ids]), PRODUCT[torch.float32].value
            measurements.at_most("rows looked up on another device", error, limit)
            for n in (1, 3, 40):
                for transpose, x in both_ways(weight, n, seed=91):
                    case = f"a product of {n} rows, {transpose=}"
                    y = _values(quantizer.matmul(moved(x), on_cuda, transpose), case)
                    error = product_error(y, x, W, transpose)
                    measurements.at_most("product on another device", error, limit, case=case)
        assert torch.equal(tile(quantizer, weight), whole), (
            "after reading on another device: expected the same Ŵ on the CPU, got another"
        )

    @needs(VALUES, DETERMINISTIC)
    def test_a_weight_on_another_device_is_packed_there(self, quantizer, measurements, monkeypatch):
        """If this fails: a weight on a device that says it is CUDA is not packed on it, or packed
        badly.

        Packed tensors must be on ``weight.device``, and so must tables and H.
        """
        without_kernels(monkeypatch)
        weight = gaussian(fit(quantizer, 20, 48), 92)  # plain torch is slow
        required = quantizer.spec.calibration == "required"
        with on_fake_cuda(quantizer):
            H = Calibration(moved(identity(weight.shape[1]).hessian), 1) if required else None
            found = quantizer.pack(moved(weight), H)
            here = {n: _values(t, f"packed tensor {n}") for n, t in found.tensors.items()}
        error = relative_error(tile(quantizer, found.layout.fill(here)), weight)
        limit = END * usual_error(quantizer) + MARGIN
        measurements.at_most("error of a weight packed on another device", error, limit)

    @needs(READS, DETERMINISTIC)
    def test_without_numba_the_values_are_the_same(self, quantizer, measurements):
        """If this fails: where numba is absent, the quantizer gives other values or none.

        Load kernels by :mod:`modulora_kernels`, which gives None there, and then run plain
        torch.
        """
        weight = packed(quantizer, SHAPE)
        asked = request(quantizer, weight, torch.float32)
        (found,) = elsewhere(without_numba_results, [asked])
        W, limit = dense(quantizer, weight), PRODUCT[torch.float32].value
        error = tile_error(found["tile.float32"], tile(quantizer, weight))
        measurements.at_most("tile without numba", error, limit)
        for name, x in asked.inputs.items():
            transpose = name.startswith("dY")
            y = found[f"{'transposed' if transpose else 'product'}.float32"]
            measurements.at_most("product without numba", product_error(y, x, W, transpose), limit)
        error = relative_error(found["own"], gaussian(weight.shape, 0))
        most = END * usual_error(quantizer) + MARGIN
        measurements.at_most("error of a weight packed without numba", error, most)


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


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toolkit find no kernels: none runs on the fake device."""
    for module, name in itertools.product((kernels, compiled), ("load", "load_triton")):
        monkeypatch.setattr(module, name, lambda module, device: None)  # noqa: ARG005


@contextmanager
def on_fake_cuda(quantizer: Quantizer) -> Iterator[None]:
    """Enter the fake device. Skip a check if a quantizer's own GPU kernels want a real one."""
    try:
        with fake_cuda():
            yield
    except Exception as error:
        if "cuda" in quantizer.spec.devices and _wants_a_gpu(error):
            pytest.skip(f"{HARDWARE}no CUDA device for kernels that the toolkit does not load")
        raise


def _wants_a_gpu(error: Exception) -> bool:
    """Whether torch missed a GPU, or Triton launched a kernel."""
    frames = (frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__))
    triton = any(name.partition(".")[0] == "triton" for name in frames)
    return triton or re.search("CUDA|NVIDIA", str(error)) is not None


def _values(found: Tensor, case: str) -> Tensor:
    """The values of a tensor that must be on the fake device."""
    assert isinstance(found, OnCuda), f"{case}: expected it on cuda, got it on {found.device}"
    return found.on_cpu
