"""L4: gradients through the core's LoRA layer equal the dense layer's."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modulora_conformance.cases import (
    DTYPES,
    SETTINGS,
    fit,
    gaussian,
    pack,
    packed,
    seeds,
    shapes,
    tile,
)
from modulora_conformance.changes import change_in_place, changed_weight, clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.packing import GLOBALS
from modulora_conformance.levels.products import FORWARD, LEADING, TRANSPOSED
from modulora_conformance.levels.tiles import OWNED
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.problems import Problem, output, problem
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import GRADIENT, PRODUCT
from modulora_core.autograd import FrozenWeight, packed_product
from modulora_core.spec import PackedWeight, Quantizer

GRADIENTS = "test_output_and_gradients_equal_those_of_the_dense_layer"
FROZEN = "test_frozen_parts_get_no_gradient"
CHANGED = "test_a_changed_code_moves_forward_and_backward_alike"
APART = "test_two_weights_in_one_graph_keep_apart"

SHAPE = (32, 64)
"""Not square, and of powers of two, which every quantizer packs fast. Other checks use odd
shapes."""


class Gradients(Level):
    """Gradients through the core's LoRA layer equal the dense layer's, and finite differences.

    The core differentiates `matmul` by calling it in the other direction. Gradients are right if
    both directions use the same weight, leave their operands alone, and return memory of their own.
    """

    level, title = "L4", "gradients"

    @needs(FORWARD, TRANSPOSED, LEADING, GLOBALS)
    @settings(SETTINGS, max_examples=8)
    @given(data=st.data())
    def test_output_and_gradients_equal_those_of_the_dense_layer(
        self, quantizer: Quantizer, measurements: Measurements, data: st.DataObject
    ) -> None:
        """If this fails: `matmul` writes to its input, or returns memory that it uses again.

        Or its result depends on `requires_grad`.
        """
        seed = data.draw(seeds, "seed")
        weight = pack(quantizer, gaussian(data.draw(shapes(quantizer), "shape"), seed))
        W = dense(quantizer, weight)
        rows = data.draw(st.sampled_from([(1,), (2,), (2, 3), (70,)]), "rows")
        rank, bias = data.draw(st.integers(1, 4), "rank"), data.draw(st.booleans(), "bias")
        for i, dtype in enumerate((*DTYPES, torch.float32)):  # other operands of the same shape
            given = problem(weight.shape, dtype, rows=rows, rank=rank, bias=bias, seed=seed + i)
            case = f"{list(weight.shape)}, x {list(given.x.shape)}, {rank=}, {bias=}; "
            check_layer(quantizer, weight, given, W, measurements, case)

    @needs(GRADIENTS)
    def test_gradients_pass_finite_differences(self, quantizer: Quantizer) -> None:
        """If this fails, though the check before passes: `matmul` is not linear in x at float64.

        It computes in fp32, or rounds x before it multiplies. Multiply a float64 x in float64.
        """
        weight = packed(quantizer, (4, 5))
        leaves = problem(weight.shape, torch.float64, rows=(2,), rank=1).leaves()

        def layer(*operands: Tensor) -> Tensor:
            return output(quantizer, weight, dict(zip(leaves, operands, strict=True)))

        # fast_mode: along random directions, as a rotated basis widens the smallest layer.
        # The layer is at most quadratic, so differences of 1e-6 are exact to 1e-10
        torch.manual_seed(0)
        assert torch.autograd.gradcheck(
            layer, tuple(leaves.values()), atol=1e-6, rtol=1e-5, fast_mode=True
        )

    @needs(GRADIENTS)
    def test_gradient_checkpointing_changes_no_bit(self, quantizer: Quantizer) -> None:
        """If this fails: a second forward gives other bits.

        Gradient checkpointing recomputes the forward during the backward. Look for sums whose order
        changes between calls, for state, and for random numbers.
        """
        weight = packed(quantizer, SHAPE)
        for dtype in (torch.float32, torch.bfloat16):
            given = problem(weight.shape, dtype, rows=(5,))
            plain = given.leaves()

            def curved(*operands: Tensor) -> Tensor:  # its gradient depends on the output's bits
                leaves = dict(zip(plain, operands, strict=True))  # noqa: B023
                return output(quantizer, weight, leaves, dropout=0.25).tanh()

            torch.manual_seed(0)  # of the dropout
            curved(*plain.values()).backward(given.dY)
            for reentrant in (False, True):
                again = given.leaves()
                torch.manual_seed(0)
                checkpoint(curved, *again.values(), use_reentrant=reentrant).backward(given.dY)
                for name, leaf in again.items():
                    case = f"d{name} in {dtype}, use_reentrant={reentrant}"
                    expected, found = plain[name].grad, leaf.grad
                    assert expected is not None
                    assert found is not None, f"{case}: expected a gradient, got none"
                    assert torch.equal(expected, found), (
                        f"{case}: expected the bits of a run without gradient checkpointing, got a "
                        f"difference of {float((expected - found).abs().max()):.3g}"
                    )

    @needs(GRADIENTS, OWNED)
    def test_inference_mode_leaves_nothing_behind(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: a scratch buffer that was allocated in inference mode breaks training.

        torch refuses to write to it later. Allocate it under `torch.inference_mode(False)`.
        """
        weight = packed(quantizer, (28, 64))  # of no other check: nothing is cached for this shape
        W = dense(quantizer, clone(weight))
        for n in (1, 33, 2000):  # the last is larger than any before: a growing buffer grows here
            given = problem(weight.shape, torch.float32, rows=(n,))
            with torch.inference_mode():
                tile(quantizer, weight, torch.float32, 0, 5)
                quantizer.matmul(given.x, weight)
                quantizer.matmul(given.dY, weight, True)
            try:
                tile(quantizer, weight, torch.float32, 0, 5)
                _check_plain(quantizer, weight, given, W, measurements, f"{n} rows")
            except RuntimeError as error:
                raise AssertionError(
                    f"{n} rows: expected a product and its gradient after inference mode, got "
                    f"{type(error).__name__}: {error}"
                ) from error

    @needs("test_the_input_of_a_product_is_unchanged", GLOBALS)
    def test_frozen_parts_get_no_gradient(self, quantizer: Quantizer) -> None:
        """If this fails: packed tensors require a gradient, or `matmul` returns a graph of its own.

        The weight is frozen: pack under `torch.no_grad()`, from `weight.detach()`.
        """
        weight = gaussian(fit(quantizer, *SHAPE), 0).requires_grad_()
        frozen = pack(quantizer, weight)
        _check_frozen(frozen, "after packing a weight that trains")
        given = problem(frozen.shape, torch.float32)
        for trained in given.operands:
            leaves = given.leaves(trained)
            y = output(quantizer, frozen, leaves)
            assert y.requires_grad, f"the output: expected a graph while {trained} trains, got none"
            y.backward(given.dY)
            _check_frozen(frozen, f"after a backward to {trained}")
            assert weight.grad is None, "the dense weight: expected no gradient, got one"
            found = [name for name, leaf in leaves.items() if leaf.grad is not None]
            assert found == [trained], f"expected a gradient of {trained} alone, got {found}"

    @needs(FROZEN)
    def test_a_product_of_frozen_operands_has_no_graph(self, quantizer: Quantizer) -> None:
        """If this fails: `matmul` or `dequantize_tile` returns a graph though nothing trains."""
        weight = packed(quantizer, SHAPE)
        operands = problem(weight.shape, torch.float32).operands
        results = {
            "the layer's output": output(quantizer, weight, operands),
            "matmul": quantizer.matmul(operands["x"], weight),
            "a tile": tile(quantizer, weight),
        }
        for name, result in results.items():
            assert not result.requires_grad, f"{name}: expected requires_grad False, got True"

    @needs(GRADIENTS)
    def test_a_changed_code_moves_forward_and_backward_alike(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: a product uses a cached weight, or a second copy of the codes.

        `load_state_dict` writes into packed tensors in place. Both directions must see it.
        """
        original = packed(quantizer, SHAPE)
        changed = changed_weight(quantizer, original)
        W = dense(quantizer, changed)
        for dtype, rows in itertools.product((torch.float64, torch.float32), (3, 70)):
            weight, given = clone(original), problem(original.shape, dtype, rows=(rows,))
            _plain(quantizer, weight, given)  # fills the caches
            change_in_place(weight, changed)
            case = f"{rows} rows in {dtype}, after a change"
            _check_plain(quantizer, weight, given, W, measurements, case)

    @needs(GRADIENTS)
    def test_two_weights_in_one_graph_keep_apart(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: the backward of a layer uses the weight of another layer of its shape.

        Something is cached by shape, or in the quantizer's instance, which all layers share.
        """
        weights = [packed(quantizer, SHAPE, seed) for seed in (1, 2)]
        given = problem(weights[0].shape, torch.float64)
        x = given.leaves("x")["x"]
        # both are multiplied before either is differentiated, as in a model
        outputs = [packed_product(x, FrozenWeight(quantizer, weight)) for weight in weights]
        for i, (y, weight) in enumerate(zip(outputs, weights, strict=True), 1):
            (dX,) = torch.autograd.grad(y, x, given.dY)
            error = product_error(dX, given.dY, dense(quantizer, weight), transpose=True)
            limit = PRODUCT[torch.float64].value
            measurements.at_most("dX of one of two weights", error, limit, case=f"weight {i}")


def check_layer(
    quantizer: Quantizer,
    weight: PackedWeight,
    given: Problem,
    W: Tensor,
    measurements: Measurements,
    case: str,
    device: str = "cpu",
) -> None:
    """Compare the output and the gradients of a layer on ``device`` with the exact ones."""
    dtype, there = given.x.dtype, given.to(device)
    leaves = there.leaves()
    y = output(quantizer, weight.to(device), leaves)
    y.backward(there.dY)
    where, limit = "" if device == "cpu" else f" on {device}", GRADIENT[dtype]
    results = {"y": y, **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, found in results.items():
        label = "y" if name == "y" else f"d{name}"
        assert found is not None, f"{label}{where} in {dtype} ({case}): expected a gradient"
        error = given.error(name, found.cpu(), W)
        case_and_reason = f"{case}{limit.reason}"
        measurements.at_most(f"{label}{where} in {dtype}", error, limit.value, case=case_and_reason)


def _check_frozen(packed: PackedWeight, when: str) -> None:
    for name, tensor in packed.tensors.items():
        case = f"packed tensor {name} {when}"
        assert not tensor.requires_grad, f"{case}: expected requires_grad False, got True"
        assert tensor.grad is None, f"{case}: expected no gradient, got one"


def _plain(quantizer: Quantizer, weight: PackedWeight, given: Problem) -> tuple[Tensor, Tensor]:
    """Y and dX without an adapter, beside which a small change would not show."""
    x = given.leaves("x")["x"]
    y = packed_product(x, FrozenWeight(quantizer, weight))
    y.backward(given.dY)
    assert x.grad is not None
    return y.detach(), x.grad


def _check_plain(
    quantizer: Quantizer,
    weight: PackedWeight,
    given: Problem,
    W: Tensor,
    measurements: Measurements,
    case: str,
) -> None:
    y, dX = _plain(quantizer, weight, given)
    limit = PRODUCT[given.x.dtype].value
    measurements.at_most("y", product_error(y, given.x, W), limit, case=case)
    error = product_error(dX, given.dY, W, transpose=True)
    measurements.at_most("dX", error, limit, case=case)
