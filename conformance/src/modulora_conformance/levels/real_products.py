"""L3: products with weights as large as real layers, and with any number of rows of x."""

from __future__ import annotations

from modulora_conformance import real
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.products import ALONE, FORWARD, TRANSPOSED
from modulora_conformance.levels.real_weights import COMMON, REAL, REAL_TILES
from modulora_conformance.real import Outcome
from modulora_conformance.results import Measurements
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import Quantizer

ANY_ROWS = "test_products_of_any_number_of_rows_equal_the_dense_ones"
UNCHANGED = "test_any_number_of_rows_is_left_unchanged"
RAGGED = "test_products_of_ragged_weights_equal_the_dense_ones"
LARGE = "test_products_of_a_large_weight_equal_the_dense_ones"


class RealProducts(Level):
    """Products have the same error at the sizes of real layers, for 1 to 4,097 rows of x.

    x is fp32, and with some numbers of rows bf16 and fp16 too.
    """

    level, title = "L3", "products"

    @needs(*ALONE)
    def test_any_number_of_rows_is_left_unchanged(self, quantizer: Quantizer) -> None:
        """If this fails: for some number of rows, `matmul` writes to x, which autograd saved."""
        _check_no_fault(real.many(quantizer), real.INPUT)

    @needs(*ALONE)
    def test_products_of_any_number_of_rows_are_the_callers(self, quantizer: Quantizer) -> None:
        """If this fails: for some number of rows, the next product overwrites the result.

        A graph may still need it. Return new memory.
        """
        _check_no_fault(real.many(quantizer), real.CALLERS)

    @needs(FORWARD, TRANSPOSED, UNCHANGED)
    def test_products_of_any_number_of_rows_equal_the_dense_ones(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: between 1 and 4,097 rows of x, some number has a wrong product.

        Kernels have paths for 1 row, for blocks of 16, 32 or 64, and for long texts. Look at the
        rows that do not fill a block.
        """
        _check_errors(real.many(quantizer), "product of any number of rows", measurements)

    @needs(ANY_ROWS, COMMON, RAGGED, LARGE)
    def test_products_of_layers_with_common_sides_equal_the_dense_ones(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: a weight with a side of 256, 896, 1024 or 4095 has a wrong product.

        A kernel has a path for sides that its block divides, and omits or repeats an end.
        """
        for found in real.sides(quantizer):
            _check_errors(found, "product with common sides", measurements)
            _check_no_fault(found, real.INPUT)

    @needs(ANY_ROWS, REAL, REAL_TILES, RAGGED, LARGE)
    def test_products_of_a_real_layer_equal_the_dense_ones(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: with 17 million elements in Ŵ, a product is wrong.

        An index or a size is a float, a byte or 16 bits, or a tile of megabytes is swapped, stale
        or left out.
        """
        _check_errors(real.big(quantizer), "product of a real layer", measurements)
        _check_no_fault(real.big(quantizer), real.INPUT)


def _check_errors(found: Outcome, name: str, measurements: Measurements) -> None:
    for error, dtype, case in found.errors:
        measurements.at_most(f"{name} in {dtype}", error, PRODUCT[dtype].value, case=case)


def _check_no_fault(found: Outcome, kind: str) -> None:
    assert kind not in found.faults, found.faults[kind][0]
