"""GGUF's Triton kernels in Triton's interpreter: run by ``test_gguf_triton.py`` in a process with
``TRITON_INTERPRET=1``.
"""

import numpy as np
import pytest
import torch
from modulora_conformance.interpreted_kernels import InterpretedKernels
from modulora_gguf import reference
from modulora_gguf.kernels import gpu
from modulora_gguf.quantizer import GGUF, Options


def blocks_of(kind, shape):
    """Random bytes whose weights are of ordinary size, so that products can be compared."""
    weights, nbytes = reference.block_of(kind)
    n = shape[0] * shape[1] // weights
    found = np.random.default_rng(0).integers(0, 256, (64 * n, nbytes), dtype=np.uint8)
    blocks = torch.from_numpy(found)
    largest = reference.DEQUANTIZE[kind](blocks).abs().amax(1)
    return blocks[(largest > 0.1) & (largest < 10)][:n].reshape(shape[0], -1)


class TestInterpreted(InterpretedKernels):
    """Rows of two blocks of 256 weights, or of three of 32; and one row of one block."""

    @pytest.fixture(
        params=[
            *((k, (9, 2 * max(48, reference.block_of(k)[0]))) for k in gpu.KINDS),
            ("Q6_K", (1, 256)),
        ],
        ids=str,
    )
    def weight(self, request):
        kind, shape = request.param
        quantizer = GGUF(Options(type=kind))
        packed = quantizer.layout(shape).fill({"blocks": blocks_of(kind, shape)})
        return quantizer, packed, reference.dequantize(packed.tensors["blocks"], kind)


def test_a_scale_that_is_not_finite_is_zero():
    packed = GGUF().layout((2, 64)).fill({"blocks": torch.full((2, 36), 255, dtype=torch.uint8)})
    assert not GGUF().dequantize_tile(packed, (0, 2), torch.float32).any()


def test_types_without_kernels_are_left_to_torch():
    packed = GGUF(Options(type="IQ2_S")).layout((8, 256)).empty("cpu")
    assert gpu.product(torch.ones(1, 256), packed, False) is None
    packed = GGUF().layout((8, 64)).empty("cpu")
    assert gpu.product(torch.ones(33, 64), packed, False) is None
