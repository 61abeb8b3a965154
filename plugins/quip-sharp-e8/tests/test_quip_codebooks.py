"""The codebooks have the sizes, norms and order that the paper gives."""

import itertools

import pytest
import torch
from modulora_quip_sharp_e8 import codebooks


def test_absolute_vectors_are_a_whole_ball_and_29_of_norm_12():
    vectors = codebooks.absolute_vectors()
    norms, ball = vectors.square().sum(-1), [tuple(vector) for vector in vectors[:227].tolist()]
    assert [int((norms[:227] == norm).sum()) for norm in (2, 4, 6, 8, 10)] == [1, 8, 28, 64, 126]
    assert ball == sorted(set(ball))
    entries = torch.tensor(list(itertools.product((1, 3, 5), repeat=8))) / 2
    assert int((entries.square().sum(-1) <= 10).sum()) == len(ball)
    long = vectors[227:]
    assert len({tuple(vector) for vector in long.tolist()}) == 29
    assert ((long == 0.5).sum(-1) == 3).all()
    assert ((long == 1.5).sum(-1) == 5).all()
    # "123" is the first of the list, "237" the last
    assert long[0].tolist() == [1.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5]
    assert long[-1].tolist() == [1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 1.5, 0.5]


@pytest.mark.parametrize(
    ("code", "point"),
    [
        (0, 8 * [0.75]),  # (1/2)⁸, no sign, + 1/4
        # 0b1 is odd: its bit 0 is flipped back, and the shift is negative
        (0b1, 8 * [0.25]),
        # bits 1 and 4 negate the coordinates 2 and 1
        (0b10010, [0.75, -0.25, -0.25, 0.75, 0.75, 0.75, 0.75, 0.75]),
        # vector 1 is (1/2)⁷ and 3/2, of odd sum: coordinate 7 is negated
        (1 << 8, [0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, -1.25]),
        # odd: bits 0 and 7 negate the coordinates 0 and 7, the latter for the second time
        (1 << 8 | 0b10000000, [-0.75, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 1.25]),
    ],
)
def test_codes_decoded_by_hand(code, point):
    assert codebooks.e8p_points(torch.tensor(code)).tolist() == point


def test_e81_has_256_distinct_points_of_e8_in_the_documented_order():
    table = codebooks.e81()
    assert len(table.unique(dim=0)) == 256
    doubled = 2 * table
    assert ((doubled % 2 == 0).all(-1) | (doubled % 2 == 1).all(-1)).all()
    assert (doubled.sum(-1) % 4 == 0).all()
    assert [int((table.square().sum(-1) == norm).sum()) for norm in (0, 2, 4)] == [1, 240, 15]
    points = [tuple(point) for point in table.tolist()]
    assert points[:113] == sorted(points[:113])
    assert points[113:241] == sorted(points[113:241])
    assert all(abs(entry) == 0.5 for point in points[113:241] for entry in point)
    assert [point.index(2) for point in points[241:249]] == list(range(8))
    assert [point.index(-2) for point in points[249:]] == list(range(7))


def test_a_gaussian_loses_as_much_as_in_the_paper(generator):
    x = 1.03 * torch.randn(8192, 8, generator=generator)
    nearest = [codebooks.nearest_brute(chunk, codebooks.e8p()) for chunk in x.split(1024)]
    points = codebooks.e8p_points(torch.cat(nearest))
    errors = (x - points).square().mean(-1) / 1.03**2
    # four standard errors of the mean, and half of the last digit that is given
    limit = 4 * float(errors.std()) / len(errors) ** 0.5 + 0.00005
    assert abs(float(errors.mean()) - 0.0915) < limit


@pytest.mark.parametrize(("bits", "scale"), [(2, None), (3, 2.04), (4, 3.45)])
def test_decode_adds_the_residual_divided_by_its_scale(bits, scale, generator):
    codes, residual = (
        torch.randint(-(1 << 15), 1 << 15, (5, 7), generator=generator).to(torch.int16)
        for _ in range(2)
    )
    expected = codebooks.e8p()[codes.long() & 0xFFFF]
    if bits == 3:
        residual = residual.to(torch.uint8)
        expected = expected + codebooks.e81()[residual.long()] / scale
    elif bits == 4:
        expected = expected + codebooks.e8p()[residual.long() & 0xFFFF] / scale
    C = codebooks.decode(codes, None if bits == 2 else residual, bits)
    # a product with the rounded reciprocal is a rounding or two from the division
    limit = 0 if bits == 2 else 2**-22
    torch.testing.assert_close(C, expected.reshape(5, 56), rtol=0, atol=limit)
