"""What kernels keep of a packed weight, and numbers that they read from bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modulora_core import kernels
from modulora_core.packed import PackedWeight

pytest.importorskip("numba")


def weight(codes: Tensor) -> PackedWeight:
    return PackedWeight("outsider", 1, (2, 4), {"codes": codes}, {"size": 3})


class Made:
    """``make``, and how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, packed: PackedWeight) -> tuple[Any, ...]:
        self.times += 1
        return packed.tensors["codes"].view(-1), packed.metadata["size"]


def test_operands_are_made_once_and_follow_changes_in_place() -> None:
    codes, make = torch.arange(8.0).view(2, 4), Made()
    packed = weight(codes)
    first, second = kernels.operands(packed, make), kernels.operands(packed, make)
    assert make.times == 1
    assert first is second
    assert first[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert first[1] == 3
    codes.mul_(2)
    assert kernels.operands(packed, make)[0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_operands_are_made_again_for_other_memory() -> None:
    """If this fails: a kernel reads what the weight was, not what it is."""
    codes, make = torch.zeros(2, 4), Made()
    packed = weight(codes)
    kernels.operands(packed, make)
    codes.data = torch.ones(2, 4)
    assert kernels.operands(packed, make)[0].tolist() == 8 * [1]
    assert make.times == 2


def test_two_quantizers_kernels_keep_theirs_apart() -> None:
    packed, one, other = weight(torch.ones(2, 4)), Made(), Made()
    kernels.operands(packed, one)
    kernels.operands(packed, other)
    assert (one.times, other.times) == (1, 1)


def test_the_copy_of_a_tensor_that_lies_askew_is_not_kept() -> None:
    raw = bytearray(b"." + torch.arange(8.0).numpy().tobytes())
    packed, make = weight(torch.frombuffer(raw, dtype=torch.float32, offset=1).view(2, 4)), Made()
    for _ in range(2):
        assert kernels.operands(packed, make)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert make.times == 2
    assert not packed.kept


def test_what_is_kept_is_no_part_of_the_weight() -> None:
    packed = weight(torch.ones(2, 4))
    kernels.operands(packed, Made())
    assert "kept" not in repr(packed)
    assert not packed.to("cpu").kept


def test_every_half_is_the_float_that_torch_makes_of_it() -> None:
    from numba import njit

    from modulora_core.kernels.cpu import from_half

    @njit
    def convert(bits: Any, out: Any) -> None:
        for k in range(bits.size):
            out[k] = from_half(bits[k])

    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    out = torch.empty(2**16)
    convert(bits.numpy(), out.numpy())
    expected = bits.view(torch.float16).float()
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~out.isnan()
    assert torch.equal(out[number].view(torch.int32), expected[number].view(torch.int32)), (
        "signs of zero too"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_floats_are_the_bits_of_whole_numbers(dtype: torch.dtype) -> None:
    """numba computes with neither; a kernel that is launched with them reads, and writes, int16."""
    codes = torch.tensor([[1.5, -2.0], [0.0, 3.25]], dtype=dtype)
    (array,) = kernels.operands(weight(codes), lambda packed: (packed.tensors["codes"],))
    assert array.dtype == "int16"
    assert torch.equal(torch.from_numpy(array).view(dtype), codes)

    def negate(bits: Any) -> None:
        bits ^= -(2**15)

    kernels.run(negate, array)
    assert torch.equal(codes, torch.tensor([[-1.5, 2.0], [-0.0, -3.25]], dtype=dtype))
    kernels.launch(negate, codes)
    assert codes[0, 0] == 1.5
