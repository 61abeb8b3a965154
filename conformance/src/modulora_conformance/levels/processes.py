"""L6: another process reads and packs the same, and options keep apart."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import (
    both_ways,
    fit,
    gaussian,
    neighbours,
    other_options,
    pack,
    packed,
    tile,
)
from modulora_conformance.changes import check_same_bytes, clone, same_bits, same_packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.crafted import ALL_BITS, OTHER_BYTES, TOO_MANY, crafted, outcomes
from modulora_conformance.elsewhere import (
    Answer,
    answered,
    elsewhere,
    first_results,
    read_protected,
    request,
)
from modulora_conformance.levels.accuracy import END, MARGIN, steeper
from modulora_conformance.levels.packing import DETERMINISTIC, GLOBALS
from modulora_conformance.levels.persistence import REGISTERED, ROUND_TRIP, SHAPE
from modulora_conformance.oracle import dense, product_error, relative_error
from modulora_conformance.pages import Place
from modulora_conformance.results import HARDWARE, NOT_OFFERED
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import Quantizer, titled

READS = "test_another_process_reads_the_same_weight"
PACKS = "test_another_process_packs_the_same_bytes"
OPTIONS = "test_options_keep_apart"

RESERVED = 0.1
"""The most of the weights that random bytes may make NaN or Inf: a format's reserved codes."""

SHAPES = ((1, 1), (5, 131), (9, 576), (40, 258))
"""Before they fit: rows that end anywhere in a byte, a word and a vector."""

ROWS = 35
"""Rows of x beside 1 and 2: more than a block of 32."""

ONLY_READ = "test_packed_tensors_are_only_read"


class Processes(Level):
    """Another process, with other options used before, reads and packs the same."""

    level, title = "L6", "persistence"

    @needs(REGISTERED, "test_a_checkpoint_records_the_options", ROUND_TRIP)
    def test_another_process_reads_the_same_weight(self, quantizer):
        """If this fails: Ŵ depends on this process: a table, a random number, the hash of a
        string."""
        expected = tile(quantizer, packed(quantizer, SHAPE))
        found = _elsewhere(quantizer, lambda answer: same_bits(answer.tile, expected)).tile
        assert same_bits(found, expected), (
            "expected the bits of this process's Ŵ in another process, got a difference of "
            f"{float((found - expected).abs().max()):.3g}"
        )

    @needs(REGISTERED, ROUND_TRIP, DETERMINISTIC, READS)
    def test_another_process_packs_the_same_bytes(self, quantizer):
        """If this fails: the bytes depend on the process: its id, the time, a random number.

        Python also draws the hash of a string for each process. Draw from a torch.Generator whose
        seed is an option.
        """
        here = packed(quantizer, SHAPE)
        there = _elsewhere(quantizer, lambda answer: same_packed(answer.packed, here)).packed
        check_same_bytes(here, there, "packed by another process")

    @needs(READS, PACKS)
    def test_options_keep_apart(self, quantizer):
        """If this fails: other options, used before in the same process, change the result.

        The key of a cache lacks an option. A model may have layers with several sets of options.
        """
        others = other_options(quantizer)
        if not others:
            pytest.skip(f"{NOT_OFFERED}it has no options to keep apart")
        answer, expected = answered(quantizer, SHAPE, others), packed(quantizer, SHAPE)
        when = f"after weights with {len(others)} other sets of options, as {titled(others[0])}"
        assert same_bits(answer.tile, tile(quantizer, clone(expected))), (
            f"{when}: expected the same bits of Ŵ, got others"
        )
        check_same_bytes(expected, answer.packed, f"packed {when}")

    @needs(READS)
    def test_two_threads_may_be_the_first_to_read(self, quantizer):
        """If this fails: two threads that read first see a table before it is filled.

        Fill a table completely, and then put it into the cache.
        """
        found = packed(quantizer, SHAPE)
        expected = tile(quantizer, found)
        asked = request(quantizer, found, torch.float32)
        for results in elsewhere(first_results, asked):
            for name, y in results.items():
                if name.startswith("tile"):
                    assert same_bits(y, expected), "expected the same Ŵ in both threads"
                    continue
                transpose = name.startswith("transposed")
                x = asked.inputs["dY.float32" if transpose else "x.float32"]
                error = product_error(y, x, expected.double(), transpose)
                assert error <= PRODUCT[torch.float32].value, f"{name}: wrong by {error:.3g}"

    @needs(READS, PACKS, GLOBALS, "test_reading_leaves_global_state_alone")
    def test_its_module_changes_no_settings(self, quantizer):
        """If this fails: importing the plugin, or its first use, changes a setting of the process.

        The number of threads, the default dtype and the gradient mode are the user's. Set them in
        a with block, which sets them back.
        """
        changed = _elsewhere(quantizer, lambda answer: not answer.changed).changed
        assert not changed, (
            f"a new process: expected {' and '.join(changed)} unchanged after importing "
            f"{type(quantizer).__module__} and one use, got another"
        )

    @needs(READS)
    def test_crafted_tensors_are_refused_or_read_in_bounds(self, quantizer):
        """If this fails: a packed value is an index that nobody checks, or a size is not checked.

        Files come from strangers. Refuse in ``check_format`` each layout that the metadata does
        not imply (:func:`modulora_kernels.check_layout`). Clamp indices before a kernel, and refuse
        them in ``check_values``: a condition on values fails on the meta device.
        Tiles are finite, but for codes that mean NaN or Inf: a tenth of random ones, or all weights
        of equal ones. Products may overflow.
        """
        weight = packed(quantizer, SHAPE)
        cases = list(crafted(quantizer, weight))
        found = outcomes(quantizer, {title: case for _, title, case in cases} | {"own": weight})
        own = found["own"]
        assert isinstance(own, dict), f"expected the packed weight read in bounds, got {own}"
        for kind, title, _ in cases:
            read = found[title]
            if isinstance(read, str):
                continue
            if kind == OTHER_BYTES:
                _check_finite(title, read["tile.float32"])
            for name, value in read.items() if kind == TOO_MANY else ():
                assert same_bits(value, own[name]), f"{title}: expected an error or the same Ŵ"

    @needs(OPTIONS, "test_columns_of_other_magnitudes_keep_the_error")
    def test_other_options_are_read_as_they_were_packed(self, quantizer, measurements):
        """If this fails: with one option changed, the weight is not read as it was packed.

        Each option has its smallest, a middle and its largest value. The size of a block is a
        constant of the module somewhere. Read it from the metadata. Columns grow 100 times from
        one end to the other, so that another block's scale shows.
        """
        cls, found = type(quantizer), neighbours(quantizer)
        if not found:
            pytest.skip(f"{NOT_OFFERED}it has no options to change")
        for options in found:
            other = cls(cls.Options.model_validate(options))
            weight = gaussian(fit(other, 24, 256), 27)
            usual = relative_error(dense(other, pack(other, weight)), weight)
            steep = steeper(weight)
            error = relative_error(dense(other, pack(other, steep)), steep)
            changed = {n: v for n, v in options.items() if v != getattr(quantizer.options, n)}
            name, limit = "error with an option changed", END * usual + MARGIN
            measurements.at_most(name, error, limit, case=titled(changed))

    @needs("test_other_options_are_read_as_they_were_packed", "test_a_new_instance_gives_the_same")
    def test_an_instance_with_other_options_reads_the_same(self, quantizer, measurements):
        """If this fails: reading uses the options of the instance, and not the packed weight's.

        Layers of a model are packed with several options. Read the metadata alone. Each option has
        its smallest, a middle and its largest value, and products are compared too.
        """
        cls, found = type(quantizer), neighbours(quantizer)
        if not found:
            pytest.skip(f"{NOT_OFFERED}it has no options to change")
        for options in found:
            other = cls(cls.Options.model_validate(options))
            weight = pack(other, gaussian(fit(other, 24, 256), 29))
            changed = {n: v for n, v in options.items() if v != getattr(quantizer.options, n)}
            W, case = dense(other, weight), titled(changed)
            for reader, who in ((other, "itself"), (quantizer, "an instance with other options")):
                assert same_bits(tile(reader, weight), tile(other, weight)), (
                    f"packed with {case}, read by {who}: expected the same bits of Ŵ, got others"
                )
                for rows in (1, 40):
                    for transpose, x in both_ways(weight, rows, seed=29):
                        error = product_error(reader.matmul(x, weight, transpose), x, W, transpose)
                        name, limit = "product with an option changed", PRODUCT[x.dtype].value
                        measurements.at_most(name, error, limit, case=f"{case}, by {who}")

    @needs(READS)
    def test_packed_tensors_are_only_read(self, quantizer):
        """If this fails: reading or a product writes to packed tensors or x, if only the same
        value.

        They may be mapped from a file that nobody may write. Work in your own memory.
        """
        _read_in_protected_memory(quantizer, None, "a write to packed tensors or x")

    @pytest.mark.parametrize("place", Place, ids=lambda place: place.value)
    @needs(READS, ONLY_READ)
    def test_nothing_beside_the_tensors_is_read(self, quantizer, place):
        """If this fails: a kernel reads or writes beyond an end of a packed tensor or of x.

        It reads a whole vector where fewer bytes are left. Bound the last block.
        """
        _read_in_protected_memory(quantizer, place, "a read beyond packed tensors or x")


def _check_finite(title: str, W: Tensor) -> None:
    """A format may have codes for NaN: E8M0 has 255, and its largest powers overflow fp32."""
    share = 1 - float(W.isfinite().double().mean())
    reserved = share == 1 and title == ALL_BITS
    assert share <= RESERVED or reserved, (
        f"{title}: expected finite tiles, got {100 * share:.0f} % NaN or Inf"
    )


def _elsewhere(quantizer: Quantizer, expected: Callable[[Answer], bool]) -> Answer:
    """Another process's answer.

    One process, which uses other options first, serves three checks. If its answer is not expected,
    a process that does nothing else answers.
    """
    try:
        found = answered(quantizer, SHAPE, other_options(quantizer))
    except pytest.fail.Exception:
        found = None
    return found if found and expected(found) else answered(quantizer, SHAPE, [])


def _read_in_protected_memory(quantizer: Quantizer, place: Place | None, fault: str) -> None:
    if sys.platform != "linux":
        pytest.skip(f"{HARDWARE}pages are protected on Linux alone")
    weights = [packed(quantizer, shape) for shape in SHAPES]
    dtypes = (torch.float32, torch.bfloat16)
    asked = [request(quantizer, weight, *dtypes, rows=ROWS) for weight in weights]
    try:
        elsewhere(read_protected, asked, place)
    except pytest.fail.Exception as failure:
        cause = fault if "exit code" in str(failure.msg) else "an error"
        pytest.fail(
            f"packed tensors in protected memory: expected no fault, got {cause}: {failure.msg}",
            pytrace=False,
        )
