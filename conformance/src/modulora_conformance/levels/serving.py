"""L8: parts for several processes, the batches of a server, CUDA graphs, and vLLM itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modulora_conformance.cases import SETTINGS, inputs, packed, shapes, tile
from modulora_conformance.changes import check_same_bytes, clone, same_bits
from modulora_conformance.checks import Level, needs
from modulora_conformance.cuda_graphs import capturing
from modulora_conformance.fake_device import moved
from modulora_conformance.in_vllm import has_vllm, vllm_answers
from modulora_conformance.levels.devices import VALUES, on_fake_cuda, without_kernels
from modulora_conformance.levels.persistence import MODEL
from modulora_conformance.levels.products import FORWARD, LEADING
from modulora_conformance.levels.tiles import RANGES
from modulora_conformance.oracle import dense, product_error
from modulora_conformance.results import NOT_INSTALLED, NOT_OFFERED
from modulora_conformance.tiny_model import load_model, servable_model
from modulora_conformance.tolerances import PRODUCT
from modulora_core.spec import PackedWeight, Quantizer

SHAPE = (384, 768)
"""Three parts, and six: of blocks of 128, and of all smaller powers of two."""

CUTS = (0, 1, 32, 64, 96, 128, 192, 256, 320, 384)
"""Rows, and half the columns, at which the weight is cut; a quantizer refuses most of them."""

PROCESSES = (2, 3, 4, 6, 8)
"""Numbers of processes that share the weight evenly."""

PARTS = "test_a_sliced_weight_is_its_part"

ROWS = (1, 2, 7, 33, 257)
"""Tokens of a step: one request, some requests, and prompts."""

TOLERANCE = 1e-4
"""Of log-probabilities in fp32: vLLM's attention and norms round otherwise than torch's."""


class Serving(Level):
    """A server asks for parts of a weight, products with batches of requests, and CUDA graphs.

    `sliced` and `spec.capturable` are optional.
    """

    level, title = "L8", "serving"

    @pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
    @needs(RANGES)
    def test_a_sliced_weight_is_its_part(self, quantizer: Quantizer, dim: int) -> None:
        """If this fails: `sliced` gives other values than rows or columns [start, stop) of Ŵ.

        Return None for a cut that isn't exact: the server keeps the whole weight then.
        """
        weight = packed(quantizer, SHAPE)
        before, W = clone(weight), tile(quantizer, weight)
        size, granted = SHAPE[dim], 0
        scale = size // CUTS[-1]
        ranges = [*pairwise(CUTS), (0, 128), (128, 256), (0, 256), (96, 384), (1, 3)]
        cuts = [(scale * a, scale * b) for a, b in ranges]
        for n in PROCESSES:
            cuts += [(rank * size // n, (rank + 1) * size // n) for rank in range(n)]
        for start, stop in cuts:
            granted += _check_part(quantizer, weight, W, dim, start, stop)
        check_same_bytes(before, weight, "the packed weight after cutting it")
        if not granted:
            pytest.skip(f"{NOT_OFFERED}it refuses these cuts")

    @needs(PARTS, FORWARD)
    @SETTINGS
    @given(data=st.data())
    def test_any_part_of_any_weight_is_exact_or_refused(self, quantizer, measurements, data):
        """If this fails: `sliced` grants a cut that it can't make exactly, or its part multiplies
        by other values.

        Return None unless both ends are between blocks. A part of a part is cut too.
        """
        if type(quantizer).sliced is Quantizer.sliced:
            pytest.skip(f"{NOT_OFFERED}it refuses all cuts")
        weight = packed(quantizer, data.draw(shapes(quantizer, 200, 400)))
        for dim in data.draw(st.sampled_from([(0,), (1,), (0, 1), (1, 0)])):
            size, step = weight.shape[dim], data.draw(st.sampled_from([1, 5, 16, 32, 64, 128]))
            start = step * data.draw(st.integers(0, (size - 1) // step))
            stop = min(size, start + step * data.draw(st.integers(1, -(-(size - start) // step))))
            if _check_part(quantizer, weight, tile(quantizer, weight), dim, start, stop):
                weight = quantizer.sliced(weight, dim, start, stop)
        x = inputs((3,), weight.shape[1], torch.float32, 80)
        error = product_error(quantizer.matmul(x, weight), x, dense(quantizer, weight))
        limit = PRODUCT[torch.float32].value
        measurements.at_most("product with a part", error, limit, case=weight.shape)

    @needs(FORWARD, LEADING)
    def test_batches_of_a_server_are_multiplied(self, quantizer, measurements):
        """If this fails: with a server's batch, a product reads other rows or columns of memory.

        A batch is padded with rows of any values, is a part of a wider matrix, or every other row.
        Call `x.contiguous()` before a kernel, in each dtype.
        """
        found = packed(quantizer, (72, 160))
        W = dense(quantizer, found)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in ROWS:
                x = inputs((rows,), found.shape[1], dtype, 81)
                for form, view in _batches(x):
                    y = quantizer.matmul(view, found)[:rows]
                    case, limit = f"{form}, {rows} rows", PRODUCT[dtype].value
                    error = product_error(y, x, W)
                    measurements.at_most(f"product of a batch in {dtype}", error, limit, case=case)

    @needs(VALUES)
    def test_a_product_can_be_recorded_in_a_graph(self, quantizer, monkeypatch):
        """If this fails: `x Ŵᵀ` reads a value on the host or copies from it, and `spec.capturable`
        says that a CUDA graph can record it.

        Decide by shapes and metadata, and keep tables in a cache with the device in its key. The
        check runs plain torch on a fake device, since recording a kernel needs a real one.
        """
        if not quantizer.spec.capturable:
            pytest.skip(f"{NOT_OFFERED}spec.capturable is False")
        without_kernels(monkeypatch)
        weight = packed(quantizer, (43, 116))
        with on_fake_cuda(quantizer):
            on_cuda = weight.layout.fill({n: moved(t) for n, t in weight.tensors.items()})
            for rows in (1, 8, 33):
                x = moved(inputs((rows,), weight.shape[1], torch.float32, 82))
                quantizer.matmul(x, on_cuda)  # makes and caches tables
                with capturing():
                    quantizer.matmul(x, on_cuda)

    @needs(MODEL)
    def test_vllm_gives_the_log_probabilities_of_transformers(self, quantizer, measurements):
        """If this fails, though the other levels pass: vLLM has a default device, dtype or thread
        that the quantizer depends on.

        It is skipped where vLLM or modulora-vllm isn't installed.
        """
        if not has_vllm():
            pytest.skip(f"{NOT_INSTALLED}vLLM and modulora-vllm")
        saved = servable_model(quantizer)
        model = load_model(saved.packed)
        for answer in vllm_answers(saved.packed):
            with torch.no_grad():
                logits = model(torch.tensor([answer.ids])).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids[1:])[:, None])
            error = (torch.tensor(answer.log_probabilities) - expected[:, 0]).abs().max()
            measurements.at_most("log-probability in vLLM", float(error), TOLERANCE)


def _check_part(
    quantizer: Quantizer, weight: PackedWeight, W: Tensor, dim: int, start: int, stop: int
) -> bool:
    """Whether a cut is granted. Fails if the part has another shape, or other bits than W's."""
    part = quantizer.sliced(weight, dim, start, stop)
    if part is None:
        return False
    case = f"{('rows', 'columns')[dim]} [{start}, {stop}) of {list(W.shape)}"
    expected = W.narrow(dim, start, stop - start)
    assert part.shape == tuple(expected.shape), (
        f"{case}: expected {list(expected.shape)}, got {list(part.shape)}"
    )
    assert same_bits(tile(quantizer, part), expected), f"{case}: not the bits of Ŵ"
    return True


def _batches(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``x: [rows, in]`` as views of other memory, whose other elements are NaN."""
    rows, columns = x.shape
    padded = x.new_full((rows + -rows % 8 + 8, columns), torch.nan)
    padded[:rows] = x
    yield "padded with rows", padded
    joined = x.new_full((rows, 3 * columns), torch.nan)
    joined[:, columns : 2 * columns] = x
    yield "a part of a joined output", joined[:, columns : 2 * columns]
    apart = x.new_full((2 * rows, columns), torch.nan)
    apart[::2] = x
    yield "every other row", apart[::2]
    yield "transposed", x.T.contiguous().T
