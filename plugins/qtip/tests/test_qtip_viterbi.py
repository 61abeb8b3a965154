"""The compiled encoder against the reference, and its distortion of a Gaussian against theory."""

import pytest
import torch
from modulora_qtip import codes, packing, reference, trellis
from modulora_qtip.reference import Options

pytest.importorskip("numba")


def encoded(w, options, scale):
    """Ŵ of a unit Gaussian ``w`` ``[M, 16]``, at ``scale`` of the code's deviation."""
    unit = scale * codes.CODES[options.code].deviation
    strings, values = packing.quantize(w * unit, options)
    read = trellis.decode(strings[None], options.bits, options.states, options.code)
    assert torch.equal(read, values), "the bit strings are circular walks with these values"
    return values / unit


def distortion(options, rows, scale, generator):
    w = torch.randn(rows, 16, generator=generator)
    return float((encoded(w, options, scale) - w).square().mean() / w.square().mean())


@pytest.mark.parametrize(
    ("bits", "states", "code", "scale", "limit"),
    [
        (2, 12, "bytes", 0.97, 0.0735),
        (1, 10, "bytes", 0.9, 1.25 * 4**-1),
        (2.5, 12, "bytes", 0.97, 1.26 * 4**-2.5),
        (3, 12, "bytes", 0.97, 1.26 * 4**-3),
        (4, 12, "bytes", 0.94, 1.35 * 4**-4),
    ],
)
def test_distortion_of_a_gaussian_is_near_the_bound(bits, states, code, scale, limit, generator):
    found = distortion(Options(bits=bits, states=states, code=code), 4096, scale, generator)
    assert 4.0**-bits < found <= limit


@pytest.mark.parametrize(
    ("bits", "states"),
    [(1, 10), (1.5, 10), (2, 10), (2.5, 10), (3, 10), (3.5, 10), (4, 10), (6, 12)],
)
def test_walks_are_as_good_as_the_references(bits, states, generator):
    options = Options(bits=bits, states=states)
    w = torch.randn(64, 16, generator=generator) * codes.CODES[options.code].deviation
    _, fast = packing.quantize(w, options)
    _, exact = reference.quantize(w, options)
    ratio = (fast - w).square().mean() / (exact - w).square().mean()
    assert ratio < 1.03, "the overlap is decided near the seam"


@pytest.mark.parametrize(("bits", "shifts"), [(2, (4, 2, 0)), (1.5, (3, 1, 0)), (2.5, (5, 2, 0))])
def test_viterbi_finds_the_best_of_all_walks(bits, shifts, generator):
    """Brute force over all walks of three weights with six bits of state.

    Weight t begins ``shifts[t]`` bits before the end: with halves t = 1 has a bit more than t = 2.
    """
    L = 6
    C = torch.randn(1 << L, generator=generator)
    w = torch.randn(1, len(shifts), generator=generator)
    found = reference.viterbi(w, C, bits)
    errors = {}
    for string in range(1 << (L + shifts[0])):
        states = [string >> shift & ((1 << L) - 1) for shift in shifts]
        errors[tuple(states)] = float((C[states] - w[0]).square().sum())
    assert tuple(found[0].tolist()) == min(errors, key=errors.__getitem__)


def test_a_walk_with_an_overlap_begins_and_ends_in_it(generator):
    C = torch.randn(1 << 8, generator=generator)
    overlap = torch.tensor([5, 40])
    walk = reference.viterbi(torch.randn(2, 20, generator=generator), C, 2, overlap)
    assert torch.equal(walk[:, 0] >> 2, overlap)
    assert torch.equal(walk[:, -1] & 63, overlap)
    assert torch.equal(walk[:, 1:] >> 2, walk[:, :-1] & 63)
