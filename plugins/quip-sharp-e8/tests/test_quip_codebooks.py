"""The codebooks hold what the paper says of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from modulora_quip_sharp_e8 import codebooks

from modulora_core.errors import OptionError

CODES = torch.arange(1 << 16)
PARITY = torch.tensor([code.bit_count() & 1 for code in range(256)])[CODES & 255]


@pytest.fixture(scope="module")
def half_integers():
    """The points of E8P12 less the 1/4 that the parity of a code's signs stands for."""
    return codebooks.e8p_points(CODES) - torch.where(PARITY == 0, 0.25, -0.25)[:, None]


def test_the_absolute_vectors_are_227_in_a_ball_and_29_of_norm_12():
    norms = codebooks.absolute_vectors().square().sum(-1)
    assert [int((norms[:227] == norm).sum()) for norm in (2, 4, 6, 8, 10)] == [1, 8, 28, 64, 126]
    assert norms[227:].tolist() == 29 * [12]


def test_the_ball_is_whole_and_in_lexicographic_order():
    vectors = [tuple(vector) for vector in codebooks.absolute_vectors()[:227].tolist()]
    assert vectors == sorted(set(vectors))
    entries = torch.tensor(list(itertools.product((1, 3, 5), repeat=8))) / 2
    assert int((entries.square().sum(-1) <= 10).sum()) == len(vectors)


def test_vectors_of_norm_12_are_distinct_and_have_three_halves():
    long = codebooks.absolute_vectors()[227:]
    assert len({tuple(vector) for vector in long.tolist()}) == 29
    assert ((long == 0.5).sum(-1) == 3).all()
    assert ((long == 1.5).sum(-1) == 5).all()
    assert long[0].tolist() == [
        1.5,
        0.5,
        0.5,
        0.5,
        1.5,
        1.5,
        1.5,
        1.5,
    ]  # "123", the first of the list
    assert long[-1].tolist() == [1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 1.5, 0.5]  # "237", the last


def test_e8p_has_65536_distinct_points():
    assert len(codebooks.e8p().unique(dim=0)) == 1 << 16


def test_each_coset_has_half_of_the_points():
    in_lattice = {}
    for shift in (0.25, -0.25):
        doubled = 2 * (codebooks.e8p() - shift)
        in_lattice[shift] = (doubled % 2 == 1).all(-1) & (
            doubled.sum(-1) % 4 == 0
        )  # half-integers of even sum
    assert int(in_lattice[0.25].sum()) == int(in_lattice[-0.25].sum()) == 1 << 15
    assert torch.equal(in_lattice[0.25], PARITY == 0)
    assert torch.equal(in_lattice[-0.25], PARITY == 1)


def test_two_more_signs_lead_to_another_point_of_the_same_coset(half_integers):
    def numbers(vectors):  # half-integers from −5/2 to 5/2 as digits 0 to 5
        return (vectors + 2.5).long() @ 6 ** torch.arange(8)

    for coset in (half_integers[PARITY == 0], half_integers[PARITY == 1]):
        inside = torch.zeros(6**8, dtype=torch.bool).index_fill(0, numbers(coset), True)
        for i, j in itertools.combinations(range(8), 2):
            flipped = coset.clone()
            flipped[:, [i, j]] *= -1
            assert inside[numbers(flipped)].all()
            flipped[:, i] *= -1  # and one sign leads out of it
            assert not inside[numbers(flipped)].any()


def test_a_code_names_its_vector_in_the_high_byte(half_integers):
    assert torch.equal(half_integers.abs(), codebooks.absolute_vectors()[CODES >> 8])


@pytest.mark.parametrize(
    ("code", "point"),
    [
        (0, 8 * [0.75]),  # (1/2)⁸, no sign, + 1/4
        # 0b1 is odd: its bit 0 is flipped back, and the side is the other one
        (0b1, 8 * [0.25]),
        # bits 1 and 4 negate the coordinates 2 and 1
        (0b10010, [0.75, -0.25, -0.25, 0.75, 0.75, 0.75, 0.75, 0.75]),
        # vector 1 is (1/2)⁷ and 3/2, of odd sum: coordinate 7 is negated
        (1 << 8, [0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, -1.25]),
        # 0b10000000 is odd: bits 0 and 7 negate the coordinates 0 and 7, the latter for the second time
        (1 << 8 | 0b10000000, [-0.75, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 1.25]),
    ],
)
def test_codes_decoded_by_hand(code, point):
    assert codebooks.e8p_points(torch.tensor(code)).tolist() == point


def test_int16_codes_are_unsigned():
    wrapped = CODES.to(torch.int16)
    assert wrapped.min() < 0
    assert torch.equal(codebooks.e8p_points(wrapped), codebooks.e8p())


def test_e81_has_256_distinct_points_of_e8():
    points = codebooks.e81()
    assert points.shape == (256, 8)
    assert len(points.unique(dim=0)) == 256
    doubled = 2 * points
    assert (
        (doubled % 2 == 0).all(-1) | (doubled % 2 == 1).all(-1)
    ).all()  # all integers or all halves
    assert (doubled.sum(-1) % 4 == 0).all()  # of even sum
    assert [int((points.square().sum(-1) == norm).sum()) for norm in (0, 2, 4)] == [1, 240, 15]


def test_e81_is_in_the_documented_order():
    points = [tuple(point) for point in codebooks.e81().tolist()]
    assert points[:113] == sorted(points[:113])
    assert points[113:241] == sorted(points[113:241])
    assert all(abs(entry) == 0.5 for point in points[113:241] for entry in point)
    assert [point.index(2) for point in points[241:249]] == list(range(8))
    assert [point.index(-2) for point in points[249:]] == list(range(7))


@pytest.mark.parametrize(("scale", "error"), [(1.03, 0.0915)])
def test_a_gaussian_loses_what_the_paper_says(scale, error, generator):
    x = scale * torch.randn(8192, 8, generator=generator)
    nearest = torch.cat(
        [codebooks.nearest_brute(chunk, codebooks.e8p()) for chunk in x.split(1024)]
    )
    errors = (x - codebooks.e8p_points(nearest)).square().mean(-1) / scale**2
    # four standard errors of the mean, and half of the last digit that is given
    assert (
        abs(float(errors.mean()) - error) < 4 * float(errors.std()) / len(errors) ** 0.5 + 0.00005
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decode_adds_the_residual_divided_by_its_scale(bits, generator):
    codes = torch.randint(-(1 << 15), 1 << 15, (5, 7), generator=generator, dtype=torch.int16)
    residual, points = None, torch.zeros(5, 7, 8)
    if bits == 3:
        residual = torch.randint(0, 256, (5, 7), generator=generator, dtype=torch.uint8)
        points = codebooks.e81()[residual.long()] / 2.04
    elif bits == 4:
        residual = torch.randint(
            -(1 << 15), 1 << 15, (5, 7), generator=generator, dtype=torch.int16
        )
        points = codebooks.e8p()[residual.long() % (1 << 16)] / 3.45
    expected = (codebooks.e8p()[codes.long() % (1 << 16)] + points).reshape(5, 56)
    C = codebooks.decode(codes, residual, bits)
    assert C.dtype == torch.float32
    # a product with the rounded reciprocal and a division differ by a rounding or two of at most 2.75 / 2.04
    torch.testing.assert_close(C, expected, rtol=0, atol=0 if bits == 2 else 2**-22)


@pytest.mark.parametrize(("bits", "residual"), [(2, True), (3, False), (4, False), (5, True)])
def test_decode_refuses_a_width_that_does_not_fit_its_residual(bits, residual):
    codes = torch.zeros(1, 1, dtype=torch.int16)
    with pytest.raises(OptionError, match=f"got {bits} bits with"):
        codebooks.decode(codes, codes if residual else None, bits)


def test_nearest_brute_finds_the_points_themselves(generator):
    index = torch.randint(0, 1 << 16, (500,), generator=generator)
    assert torch.equal(codebooks.nearest_brute(codebooks.e8p()[index], codebooks.e8p()), index)
