"""L2: a quantizer keeps no state between weights, instances and threads."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import both_ways, fit, gaussian, pack, tile
from modulora_conformance.changes import check_same_bytes, kept_settings, same_bits, same_packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.accuracy import END, MARGIN, PROMISED, WIDTHS, usual_error
from modulora_conformance.levels.packing import GLOBALS
from modulora_conformance.levels.tiles import RANGES
from modulora_conformance.oracle import relative_error
from modulora_core.spec import PackedWeight, Quantizer

APART = "test_weights_of_other_shapes_keep_apart"
NEW = "test_a_new_instance_gives_the_same"
ANOTHER = "test_packing_another_weight_leaves_this_one"

SHAPES = ((4, 100), (4, 32), (44, 32), (44, 100), (100, 4))

ROUNDS = 12
"""Two threads begin together so often: enough that a race shows nearly always."""

SWITCH = 1e-5
"""Seconds until Python changes the thread."""


class State(Level):
    """A quantizer holds its options alone: neither order, instance nor thread changes a result."""

    level, title = "L2", "tiles"

    @needs(RANGES, ANOTHER, PROMISED, WIDTHS)
    def test_weights_of_other_shapes_keep_apart(self, quantizer):
        """If this fails: reading a weight uses a shape or a table of the weight before.

        A shape is kept in the instance, or a cache's key lacks it. Store what reading needs in the
        packed tensors and the metadata.
        """
        weights = [gaussian(fit(quantizer, *shape), 30) for shape in SHAPES]
        expected = [_read(type(quantizer)(quantizer.options), weight)[1] for weight in weights]
        found = [pack(quantizer, weight) for weight in weights]
        for order in (range(5), (4, 2, 0, 1, 0, 3)):
            for i in order:
                for name, value in _results(quantizer, found[i]).items():
                    assert same_bits(value, expected[i][name]), (
                        f"{name} of a {list(found[i].shape)} weight: expected the bits that a new "
                        "instance gives, got others after weights of other shapes"
                    )
        for weight, packed in zip(weights, found, strict=True):
            error, most = (
                relative_error(tile(quantizer, packed), weight),
                END * usual_error(quantizer),
            )
            assert error <= most + MARGIN, (
                f"a {list(weight.shape)} weight after others: expected an error of at most "
                f"{most:.3g}, got {error:.3g}"
            )

    @needs(APART)
    def test_a_new_instance_gives_the_same(self, quantizer):
        """If this fails: an instance that packed nothing reads another Ŵ, or changes another one.

        A checkpoint constructs an instance from the options alone. Set nothing in `pack`, and
        nothing in `__init__` that other instances share.
        """
        weight = gaussian(fit(quantizer, *SHAPES[0]), 31)
        found, expected = _read(quantizer, weight)
        for reader in (type(quantizer)(quantizer.options), quantizer):
            for name, value in _results(reader, found).items():
                assert same_bits(value, expected[name]), (
                    f"{name} by another instance: expected the same bits, got others"
                )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    @needs(APART)
    def test_the_default_dtype_does_not_matter(self, quantizer, dtype):
        """If this fails: packing or reading uses torch's default dtype, which users change.

        transformers sets it to bfloat16 while it loads a model. Name the dtype of each new tensor.
        """
        weight = gaussian(fit(quantizer, *SHAPES[0]), 34)
        expected, results = _read(quantizer, weight)
        with kept_settings():
            torch.set_default_dtype(dtype)
            found, others = _read(type(quantizer)(quantizer.options), weight)
        check_same_bytes(expected, found, f"packed with the default dtype {dtype}")
        for name, value in others.items():
            assert same_bits(value, results[name]), (
                f"{name} with the default dtype {dtype}: expected the same bits, got others"
            )

    @pytest.mark.threads
    @needs(APART, GLOBALS)
    def test_two_threads_get_what_one_gets(self, quantizer):
        """If this fails: two threads that use an instance at once disturb each other.

        A data loader, a server and autograd have threads of their own. Keep scratch memory in local
        variables.
        """
        weights = [gaussian(fit(quantizer, *shape), 32) for shape in SHAPES[:2]]
        expected = [_read(quantizer, weight) for weight in weights]

        together = Barrier(len(weights))

        def work(i: int) -> list[str]:
            together.wait()  # else one may pack only while the other reads
            found, results = _read(quantizer, weights[i])
            wrong = [n for n, value in results.items() if not same_bits(value, expected[i][1][n])]
            return wrong if same_packed(found, expected[i][0]) else ["packed tensors", *wrong]

        interval, wrong = sys.getswitchinterval(), list[str]()
        sys.setswitchinterval(SWITCH)
        try:
            with ThreadPoolExecutor(len(weights)) as pool:
                for _ in range(ROUNDS):
                    wrong += (name for names in pool.map(work, (0, 1)) for name in names)
        finally:
            sys.setswitchinterval(interval)
        assert not wrong, f"two threads: expected the bits of one, got others in {wrong[0]}"


def _read(quantizer: Quantizer, weight: Tensor) -> tuple[PackedWeight, dict[str, Tensor]]:
    found = pack(quantizer, weight)
    return found, _results(quantizer, found)


def _results(quantizer: Quantizer, packed: PackedWeight) -> dict[str, Tensor]:
    """A tile and both products."""
    found = {"the tile": tile(quantizer, packed, torch.float32)}
    for transpose, x in both_ways(packed, 3, seed=33):
        name = "the transposed product" if transpose else "the product"
        found[name] = quantizer.matmul(x, packed, transpose)
    return found
