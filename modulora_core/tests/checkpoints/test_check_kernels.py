"""A loaded model lets its quantizers compare their kernels, once for each layout."""

import warnings

import torch

from modulora_core.hf.load_model import check_kernels
from modulora_core.packed_parameters import PackedParameter
from modulora_core.progress import no_progress


def weights(toy):
    quantizer = toy.Toy()
    shapes = ((6, 4), (6, 4), (3, 4))
    return [PackedParameter(quantizer, quantizer.pack(torch.randn(shape))) for shape in shapes]


def test_each_layout_is_compared_once_and_a_difference_is_a_warning(toy, monkeypatch):
    asked = []

    def differences(self, packed, dtype):
        asked.append((packed.shape, dtype))
        return ["mine.kernels: tile of [6, 4]: error 1.0"] if packed.shape == (6, 4) else []

    monkeypatch.setattr(toy.Toy, "check_kernels", differences)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        check_kernels(weights(toy), torch.bfloat16, no_progress)
    assert asked == [((6, 4), torch.bfloat16), ((3, 4), torch.bfloat16)]
    (message,) = [str(each.message) for each in warned]
    assert "mine.kernels: tile of [6, 4]: error 1.0. Please report" in message
    assert "doctor --gpu" in message
