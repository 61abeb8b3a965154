"""L4: gradients.

A quantizer writes none: the core differentiates ``matmul`` by calling it the other way. So they are right where both ways multiply by
the same weight, leave their operands alone, and give results that belong to the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modulora_conformance import oracle
from modulora_conformance.cases import DTYPES, SETTINGS, fit, gaussian, pack, packed, seeds, shapes
from modulora_conformance.changes import change_in_place, changed_weight, clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.problems import Problem, gradients, output, problem
from modulora_conformance.tolerances import GRADIENT, PRODUCT
from modulora_core.autograd import lora_linear
from modulora_core.spec import PackedWeight, Quantizer

FORWARD, TRANSPOSED = (
    "test_the_product_equals_the_dense_one",
    "test_the_transposed_product_equals_the_dense_one",
)
SHAPE = (32, 64)
"""Not square, and of powers of two, which every quantizer packs fast; odd shapes are drawn."""


class Gradients(Level):
    level, title = "L4", "gradients"

    @settings(SETTINGS, max_examples=8)
    @given(data=st.data())
    @needs(FORWARD, TRANSPOSED, "test_leading_dimensions_are_kept")
    def test_output_and_gradients_equal_those_of_the_dense_layer(
        self, quantizer: Quantizer, measurements: Measurements, data: st.DataObject
    ) -> None:
        """If this fails: ``matmul`` changes what it is given, returns memory that it uses again, or gives another product when a
        graph is recorded. ``x`` isn't yours to write to, the result isn't yours to keep, and nothing may depend on ``requires_grad``.
        """
        seed = data.draw(seeds, "seed")
        weight = pack(quantizer, gaussian(data.draw(shapes(quantizer), "shape"), seed))
        W = oracle.dense(quantizer, weight)
        rows = data.draw(st.sampled_from([(1,), (2,), (2, 3), (70,)]), "rows")
        rank = data.draw(st.integers(1, 4), "rank")
        bias = data.draw(st.booleans(), "bias")
        for dtype in DTYPES:
            given = problem(weight.shape, dtype, rows=rows, rank=rank, bias=bias, seed=seed)
            leaves = given.leaves()
            y = output(quantizer, weight, leaves)
            y.backward(given.dY)
            case = f"{list(weight.shape)}, x {list(given.x.shape)}, rank {rank}, bias {bias}; {GRADIENT[dtype].reason}"
            error = given.error("y", y.detach().flatten(0, -2), W)
            measurements.at_most(f"y in {dtype}", error, GRADIENT[dtype].value, case=case)
            for name, gradient in gradients(leaves).items():
                assert gradient is not None, (
                    f"d{name} in {dtype} ({case}): expected a gradient, got none"
                )
                error = given.error(name, gradient, W)
                measurements.at_most(f"d{name} in {dtype}", error, GRADIENT[dtype].value, case=case)

    @needs("test_output_and_gradients_equal_those_of_the_dense_layer")
    def test_gradients_pass_finite_differences(self, quantizer: Quantizer) -> None:
        """If this fails though the check before passes: ``matmul`` isn't linear in ``x`` at float64, as where it computes in fp32 or
        rounds ``x`` before it multiplies. A float64 ``x`` is multiplied in float64: gradients are proven that way.
        """
        weight = packed(quantizer, (4, 5))
        leaves = problem(weight.shape, torch.float64, rows=(2,), rank=1).leaves()

        def layer(*operands: Tensor) -> Tensor:
            return output(quantizer, weight, dict(zip(leaves, operands, strict=True)))

        # fast: along random directions, as a rotated basis makes the smallest layer wide. The layer is at most quadratic in its
        # operands, so that differences of 1e-6 are exact but for rounding, 1e-10
        torch.manual_seed(0)
        assert torch.autograd.gradcheck(
            layer, tuple(leaves.values()), atol=1e-6, rtol=1e-5, fast_mode=True
        )

    @needs("test_output_and_gradients_equal_those_of_the_dense_layer")
    def test_gradient_checkpointing_changes_no_bit(self, quantizer: Quantizer) -> None:
        """If this fails: the forward gives other bits the second time. Gradient checkpointing runs it again in the backward: look for
        sums whose order changes between calls, for state, and for random numbers of your own.
        """
        weight = packed(quantizer, SHAPE)
        for dtype in (torch.float32, torch.bfloat16):
            given = problem(weight.shape, dtype, rows=(5,))
            plain = given.leaves()
            torch.manual_seed(0)  # of the dropout
            _curved(quantizer, weight, plain).backward(given.dY)
            for reentrant in (False, True):
                recomputed = given.leaves()
                torch.manual_seed(0)
                _checkpointed(quantizer, weight, recomputed, reentrant).backward(given.dY)
                for name, leaf in recomputed.items():
                    expected, found = plain[name].grad, leaf.grad
                    assert expected is not None
                    assert found is not None, (
                        f"d{name}: expected a gradient under checkpointing, got none"
                    )
                    assert torch.equal(expected, found), (
                        f"d{name} in {dtype}, use_reentrant={reentrant}: expected the same bits with gradient checkpointing as "
                        f"without, got a difference of {float((expected - found).abs().max()):.3g}"
                    )

    @needs(
        "test_output_and_gradients_equal_those_of_the_dense_layer", "test_the_tile_is_the_callers"
    )
    def test_inference_mode_leaves_nothing_behind(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: memory that was first taken under ``torch.inference_mode()``, as while a model generates, is written to in the
        training that comes after, which torch refuses. Allocate a scratch buffer that you keep under ``torch.inference_mode(False)``.
        """
        weight = packed(
            quantizer, (28, 64)
        )  # of no other check: nothing is kept for this shape yet
        W, rows = oracle.dense(quantizer, clone(weight)), (0, 5)
        # the last takes more memory than any product before: a buffer that grows does so here
        for n in (1, 33, 2000):
            given = problem(weight.shape, torch.float32, rows=(n,), bias=False)
            with torch.inference_mode():
                quantizer.dequantize_tile(weight, rows, torch.float32)
                quantizer.matmul(given.x, weight)
                quantizer.matmul(given.dY, weight, True)
            try:
                quantizer.dequantize_tile(weight, rows, torch.float32)
                y, dX = _run(quantizer, weight, given)
            except RuntimeError as error:
                raise AssertionError(
                    f"{n} rows: expected a product and its gradient after one in inference mode, got {type(error).__name__}: {error}"
                ) from error
            for what, result, x, transpose in (
                ("y", y, given.x, False),
                ("dX", dX, given.dY, True),
            ):
                error_of = oracle.product_error(result, x, W, transpose)
                measurements.at_most(
                    f"{what} after inference mode",
                    error_of,
                    PRODUCT[torch.float32].value,
                    case=f"{n} rows",
                )

    @needs(
        "test_the_input_of_a_product_is_unchanged"
    )  # autograd, which saved it before, says so too
    def test_frozen_parts_get_no_gradient(self, quantizer: Quantizer) -> None:
        """If this fails: packed tensors require a gradient, or ``matmul`` returns a result with a graph of its own. The weight is
        frozen: pack under ``torch.no_grad()``, from ``weight.detach()``.
        """
        weight = gaussian(fit(quantizer, *SHAPE), 0).requires_grad_()
        frozen = pack(quantizer, weight)
        _check_frozen(frozen.tensors, "after packing a weight that trains")
        given = problem(frozen.shape, torch.float32)
        for trained in given.tensors:
            leaves = given.leaves(trained)
            y = output(quantizer, frozen, leaves)
            assert y.requires_grad, f"the output: expected a graph where {trained} trains, got none"
            y.backward(given.dY)
            _check_frozen(frozen.tensors, f"after a backward to {trained}")
            assert weight.grad is None, "the weight that was packed: expected no gradient, got one"
            found = sorted(name for name, leaf in leaves.items() if leaf.grad is not None)
            assert found == [trained], (
                f"expected a gradient of {trained} alone, got those of {found}"
            )

    @needs("test_frozen_parts_get_no_gradient")
    def test_a_product_of_frozen_operands_has_no_graph(self, quantizer: Quantizer) -> None:
        """If this fails: ``matmul`` or ``dequantize_tile`` returns a tensor that requires a gradient though nothing trains."""
        weight = packed(quantizer, SHAPE)
        leaves = {
            name: leaf.detach()
            for name, leaf in problem(weight.shape, torch.float32).tensors.items()
        }
        results = {
            "the layer's output": output(quantizer, weight, leaves),
            "matmul": quantizer.matmul(leaves["x"], weight),
            "a tile": quantizer.dequantize_tile(weight, (0, 1), torch.float32),
        }
        for name, result in results.items():
            assert not result.requires_grad, (
                f"{name}: expected requires_grad False where nothing trains, got True"
            )

    @needs("test_output_and_gradients_equal_those_of_the_dense_layer")
    def test_a_changed_code_moves_forward_and_backward_alike(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: a product doesn't read the packed tensors but something made of them before: a decoded weight that was kept,
        or a second copy of the codes for the other direction. ``load_state_dict`` writes into packed tensors in place; both ways must
        see it.
        """
        original = packed(quantizer, SHAPE)
        changed = changed_weight(quantizer, original)
        W = oracle.dense(quantizer, changed)
        for dtype, rows in itertools.product((torch.float64, torch.float32), (3, 70)):
            weight, given = clone(original), problem(original.shape, dtype, rows=(rows,))
            _run(quantizer, weight, given)  # whatever would be kept is there now
            change_in_place(weight, changed)
            y, dX = _run(quantizer, weight, given)
            limit, case = PRODUCT[dtype].value, f"{rows} rows in {dtype}"
            error = oracle.product_error(y, given.x, W)
            measurements.at_most("forward after a change", error, limit, case=case)
            error = oracle.product_error(dX, given.dY, W, transpose=True)
            measurements.at_most("dX after a change", error, limit, case=case)

    @needs("test_output_and_gradients_equal_those_of_the_dense_layer")
    def test_two_weights_in_one_graph_keep_apart(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: the backward of one layer uses the weight of another of its shape: something is kept by shape, or by the
        quantizer's instance, which all layers share.
        """
        first, second = packed(quantizer, SHAPE, seed=1), packed(quantizer, SHAPE, seed=2)
        given = problem(first.shape, torch.float64, bias=False)
        x = given.x.clone().requires_grad_()
        # both are multiplied before either is differentiated, as the layers of a model are
        y, z = (lora_linear(x, quantizer, weight) for weight in (first, second))
        for what, result, weight in (("first", y, first), ("second", z, second)):
            (dX,) = torch.autograd.grad(result, x, given.dY)
            error = oracle.product_error(
                dX, given.dY, oracle.dense(quantizer, weight), transpose=True
            )
            measurements.at_most(
                f"dX of the {what} of two weights", error, PRODUCT[torch.float64].value
            )


def _curved(quantizer: Quantizer, weight: PackedWeight, leaves: dict[str, Tensor]) -> Tensor:
    """The output through a nonlinearity, whose gradient depends on the output's bits."""
    return output(quantizer, weight, leaves, dropout=0.25).tanh()


def _checkpointed(
    quantizer: Quantizer, weight: PackedWeight, leaves: dict[str, Tensor], reentrant: bool
) -> Tensor:
    """The output, to be computed again in the backward."""

    def layer(*operands: Tensor) -> Tensor:
        return _curved(quantizer, weight, dict(zip(leaves, operands, strict=True)))

    y: Tensor = checkpoint(layer, *leaves.values(), use_reentrant=reentrant)
    return y


def _check_frozen(tensors: Mapping[str, Tensor], when: str) -> None:
    for name, tensor in tensors.items():
        assert not tensor.requires_grad, (
            f"packed tensor {name} {when}: expected requires_grad False, got True"
        )
        assert tensor.grad is None, f"packed tensor {name} {when}: expected no gradient, got one"


def _run(quantizer: Quantizer, weight: PackedWeight, given: Problem) -> tuple[Tensor, Tensor]:
    """Output and dX of the packed weight alone: beside an adapter a small change would not be seen."""
    x = given.x.clone().requires_grad_()
    y = lora_linear(x, quantizer, weight)
    y.backward(given.dY)
    assert x.grad is not None
    return y.detach(), x.grad
