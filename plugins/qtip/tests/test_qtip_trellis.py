"""Bit strings, states and tiles, by their definition."""

import math

import pytest
import torch
from modulora_qtip import codes, trellis
from modulora_qtip.trellis import T

RATES = [*range(1, 9), 1.5, 2.5, 3.5, 7.5]


def bits_of(string):
    """The bits of a tile in their order, by the format's words."""
    halves = [h & 0xFFFF for h in string.tolist()]
    words = [halves[i] | halves[i + 1] << 16 for i in range(0, len(halves), 2)]
    return "".join(f"{word:032b}" for word in words)


@pytest.mark.parametrize("K", RATES)
@pytest.mark.parametrize("L", [10, 12, 16])
def test_a_state_is_the_bits_of_the_circular_string_that_end_with_its_weight(K, L, generator):
    units = int(16 * K)
    string = torch.randint(-(2**15), 2**15, (units,), generator=generator, dtype=torch.int16)
    ring = bits_of(string) * 2
    ends = [len(ring) // 2 + math.floor((t + 1) * K) for t in range(T)]
    expected = [int(ring[end - L : end], 2) for end in ends]
    assert trellis.states(string, K, L).tolist() == expected


@pytest.mark.parametrize("K", RATES)
def test_packed_walks_have_their_states(K, generator):
    strings = torch.randint(
        -(2**15), 2**15, (3, 2, int(16 * K)), generator=generator, dtype=torch.int16
    )
    assert torch.equal(trellis.pack(trellis.states(strings, K, 16), K), strings)
    assert torch.equal(trellis.pack(trellis.states(strings, K, 10), K), strings)


def test_weights_of_a_tile_are_in_the_order_of_the_format():
    C = torch.arange(256).reshape(16, 16).T.float()  # C[output, input] = 16 input + output
    (sequence,) = trellis.to_sequences(C)[0]
    for t in range(T):
        lane, i = t // 8, t % 8
        r, c = 2 * (lane % 4), lane // 4
        row, column = r + (0, 1, 8, 9)[i % 4], c + (8 if i >= 4 else 0)
        assert sequence[t] == 16 * row + column


def half(bits):
    """An fp16 number by its bits, of numbers that are not subnormal."""
    sign, exponent, fraction = bits >> 15, bits >> 10 & 31, bits & 1023
    return (-1) ** sign * 2.0 ** (exponent - 15) * (1 + fraction / 1024)


def nearest_half(x):
    return float(torch.tensor(x, dtype=torch.float64).half())


@pytest.mark.parametrize("state", [0, 1, 2, 4095, 12345, 40000, 65535])
def test_values_are_the_code_functions(state):
    def x(a, b):
        return (a * state + b) % 2**32

    def total(number):
        return sum(number.to_bytes(4, "little"))

    def halves(number):
        number = (number & 0x8FFF8FFF) ^ 0x3B603B60
        return nearest_half(half(number & 0xFFFF) + half(number >> 16))

    expected = {
        "1mad": total(x(34038481, 76625530)) - 510,
        "3inst": halves(x(89226354, 64248484)),
        "mcg": halves(x(0xCBAC1FED, 0)),
        "mul1": nearest_half((1024 + total(x(0x83DCD12D, 0))) * half(0x1EEE) + half(0xC931)),
    }
    for code, value in expected.items():
        assert float(codes.values(torch.tensor(state), code)) == value, code
