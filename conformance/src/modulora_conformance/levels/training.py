"""L4: gradients stay right in the ways that training uses a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from modulora_conformance.cases import inputs, packed, tile
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.gradients import APART, GRADIENTS, SHAPE
from modulora_conformance.levels.lookups import LOOKUP
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.problems import output, problem
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import GRADIENT, PRODUCT
from modulora_core.packed_parameters import PackedParameter, PackedStack
from modulora_core.spec import Quantizer

TOKENS = (3, 0, 40)
"""Tokens of each expert: few, none and many."""


class Training(Level):
    """Gradients stay right under autocast, in a second backward, for experts and tied tables."""

    level, title = "L4", "gradients"

    @needs(GRADIENTS)
    def test_a_second_backward_gives_the_same_gradients(self, quantizer: Quantizer) -> None:
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
    def test_a_parameter_written_before_the_backward_is_noticed(self, quantizer: Quantizer) -> None:
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
    def test_autocast_only_rounds(self, quantizer: Quantizer, measurements: Measurements) -> None:
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
    def test_experts_keep_apart(self, quantizer: Quantizer, measurements: Measurements) -> None:
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
    def test_a_tied_table_reads_and_multiplies_alike(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
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
