"""L4: gradients through the core's LoRA layer equal the dense layer's."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from modulora_conformance.cases import (
    DTYPES,
    SETTINGS,
    fit,
    gaussian,
    inputs,
    pack,
    packed,
    seeds,
    shapes,
    tile,
)
from modulora_conformance.changes import change_in_place, changed_weight, clone, same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.levels.packing import GLOBALS
from modulora_conformance.levels.products import FORWARD, LEADING, TRANSPOSED
from modulora_conformance.levels.tiles import OWNED
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.problems import Problem, output, problem
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import GRADIENT, PRODUCT
from modulora_core.autograd import FrozenWeight, packed_product
from modulora_core.packed_parameters import PackedParameter, PackedStack
from modulora_core.spec import PackedWeight, Quantizer

GRADIENTS = "test_output_and_gradients_equal_those_of_the_dense_layer"
FROZEN = "test_frozen_parts_get_no_gradient"
APART = "test_two_weights_in_one_graph_keep_apart"

SHAPE = (32, 64)
"""Not square, and of powers of two, which every quantizer packs fast. Other checks use odd
shapes."""

TOKENS = (3, 0, 40)
"""Tokens of each expert: few, none and many."""


class Gradients(Level):
    """Gradients through the core's LoRA layer equal the dense layer's, in each way of training.

    The core differentiates `matmul` by calling it in the other direction. Gradients are right if
    both directions use the same weight, leave their operands alone, and return memory of their own.
    """

    level, title = "L4", "gradients"

    @needs(FORWARD, TRANSPOSED, LEADING, GLOBALS)
    @settings(SETTINGS, max_examples=8)
    @given(data=st.data())
    def test_output_and_gradients_equal_those_of_the_dense_layer(
        self, quantizer, measurements, data
    ):
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
    def test_gradient_checkpointing_changes_no_bit(self, quantizer):
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
    def test_inference_mode_leaves_nothing_behind(self, quantizer, measurements):
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
    def test_frozen_parts_get_no_gradient(self, quantizer):
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
    def test_a_product_of_frozen_operands_has_no_graph(self, quantizer):
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
    def test_a_changed_code_moves_forward_and_backward_alike(self, quantizer, measurements):
        """If this fails: a product uses a cached weight, or a second copy of the codes.

        `load_state_dict` writes into packed tensors in place. Both directions and `lookup` must see
        it.
        """
        original = packed(quantizer, SHAPE)
        changed = changed_weight(quantizer, original)
        W, ids = dense(quantizer, changed), torch.arange(SHAPE[0])
        for dtype, rows in itertools.product((torch.float64, torch.float32), (3, 70)):
            weight, given = clone(original), problem(original.shape, dtype, rows=(rows,))
            _plain(quantizer, weight, given)  # fills the caches
            quantizer.lookup(ids, weight, torch.float64)
            change_in_place(weight, changed)
            found = quantizer.lookup(ids, weight, torch.float64)
            assert same_bits(found, W[ids]), "rows looked up after a change: expected the new ones"
            case = f"{rows} rows in {dtype}, after a change"
            _check_plain(quantizer, weight, given, W, measurements, case)

    @needs(GRADIENTS)
    def test_two_weights_in_one_graph_keep_apart(self, quantizer, measurements):
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

    @needs(GRADIENTS)
    def test_a_second_backward_gives_the_same_gradients(self, quantizer):
        """If this fails: the backward consumes or changes what it needs.

        Several losses may share a graph (`retain_graph=True`). Free nothing in the backward, and
        write to nothing that was saved.
        """
        weight = packed(quantizer, SHAPE)
        given = problem(weight.shape, torch.float32)
        leaves = given.leaves()
        y = output(quantizer, weight, leaves)
        first, second = (
            torch.autograd.grad(y, list(leaves.values()), given.dY, retain_graph=True)
            for _ in range(2)
        )
        for name, a, b in zip(leaves, first, second, strict=True):
            assert torch.equal(a, b), f"d{name}: expected the same bits again, got others"

    @needs(GRADIENTS)
    def test_a_parameter_written_before_the_backward_is_noticed(self, quantizer):
        """If this fails: the backward uses an adapter's values from after the forward.

        An optimizer that steps too early would train with mixed values unnoticed. Save A and B by
        `save_for_backward`, whose versions torch compares.
        """
        weight = packed(quantizer, SHAPE)
        given = problem(weight.shape, torch.float32)
        for name in ("A", "B"):
            leaves = given.leaves()
            y = output(quantizer, weight, leaves)
            with torch.no_grad():
                leaves[name].mul_(2)
            with pytest.raises(RuntimeError):
                y.backward(given.dY)

    @needs(GRADIENTS)
    def test_autocast_only_rounds(self, quantizer, measurements):
        """If this fails: under `torch.autocast` a product has another dtype, or loses digits.

        `Trainer(bf16=True)` uses it. Turn it off inside of `matmul`, whose dtype is the input's, by
        `modulora_core.dense_products.without_autocast(x.device)`: it takes the meta device too.
        """
        weight = packed(quantizer, SHAPE)
        W, limit = dense(quantizer, weight), GRADIENT[torch.bfloat16]
        given = problem(weight.shape, torch.float32, rows=(5,))
        leaves = given.leaves()
        with torch.autocast("cpu", torch.bfloat16):
            y = output(quantizer, weight, leaves)
            plain = quantizer.matmul(given.x, weight)
        y.backward(given.dY)
        assert plain.dtype == torch.float32, f"matmul: expected float32, got {plain.dtype}"
        error = product_error(plain, given.x, W)
        measurements.at_most("matmul under autocast", error, PRODUCT[torch.float32].value)
        for name, found in {"y": y, **{n: leaf.grad for n, leaf in leaves.items()}}.items():
            assert found is not None, f"{name}: expected a gradient, got none"
            assert found.dtype == torch.float32, f"{name}: expected float32, got {found.dtype}"
            error = given.error(name, found, W)
            measurements.at_most(f"{name} under autocast", error, limit.value)

    @needs(GRADIENTS, APART, "test_zero_rows_give_zero_rows")
    def test_experts_keep_apart(self, quantizer, measurements):
        """If this fails: an expert's product or gradient uses another expert's weight.

        Experts have one shape and are multiplied one after another, some by no token at all.
        """
        weights = [packed(quantizer, SHAPE, seed) for seed in range(len(TOKENS))]
        stack = PackedStack(PackedParameter(quantizer, weight) for weight in weights)
        features = weights[0].shape[1]
        xs = [inputs((n,), features, torch.float32, n).requires_grad_() for n in TOKENS]
        ys = [stack[i].multiply(x) for i, x in enumerate(xs)]  # type: ignore[operator]
        dYs = [inputs((n,), weights[0].shape[0], torch.float32, n + 1) for n in TOKENS]
        torch.autograd.backward(ys, dYs)
        for i, (x, y, dY) in enumerate(zip(xs, ys, dYs, strict=True)):
            W, limit, case = dense(quantizer, weights[i]), PRODUCT[x.dtype].value, f"expert {i}"
            assert x.grad is not None, f"{case}: expected a gradient, got none"
            measurements.at_most("an expert's output", product_error(y, x, W), limit, case=case)
            error = product_error(x.grad, dY, W, transpose=True)
            measurements.at_most("an expert's dX", error, limit, case=case)

    @needs(GRADIENTS, LOOKUP, "test_rows_looked_up_are_the_callers")
    def test_a_tied_table_reads_and_multiplies_alike(self, quantizer, measurements):
        """If this fails: an embedding and a head on one packed table use different values.

        Or the gradient of the head does not reach the embedded rows.
        """
        table = packed(quantizer, SHAPE)
        W, ids = dense(quantizer, table), torch.tensor([3, 0, 3, 9])
        rows = quantizer.lookup(ids, table, torch.float32).requires_grad_()
        assert torch.equal(rows, tile(quantizer, table)[ids]), "expected the rows of the tile"
        logits: Tensor = linear(rows, PackedParameter(quantizer, table))  # type: ignore[arg-type]
        dY = inputs((len(ids),), table.shape[0], torch.float32, 2)
        logits.backward(dY)
        limit = PRODUCT[torch.float32].value
        measurements.at_most("logits of a tied head", product_error(logits, rows, W), limit)
        assert rows.grad is not None, "embedded rows: expected a gradient, got none"
        error = product_error(rows.grad, dY, W, transpose=True)
        measurements.at_most("gradient of embedded rows", error, limit)


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
