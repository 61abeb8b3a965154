"""The method: incoherence, feedback, sweeps and bits; the fast solver against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from modulora_kernels.incoherence import proxy_error
from modulora_qtip import packing, reference
from modulora_qtip.quantizer import QTIP, packed_of, tensors
from modulora_qtip.reference import Options
from pydantic import ValidationError

from modulora_core.errors import CheckpointError, OptionError, ShapeError, WeightError
from modulora_core.packed import PackedWeight
from modulora_core.quantization.quality import choice_of
from modulora_core.registry import Choice
from modulora_core.spec import Calibration

SMALL = {"states": 10}


def error(solution, W, H, options):
    return proxy_error(W, solution.dequantize(options), H)


def test_the_fast_solver_is_as_good_as_the_reference(layer):
    W, H = layer(32, 40)
    for sweeps in (0, 1):
        options = Options(sweeps=sweeps, **SMALL)
        exact, fast = (error(m.solve(W, H, options), W, H, options) for m in (reference, packing))
        assert fast < 1.1 * exact


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (14, 2)),
        ({"states": 10, "sweeps": 0}, (10, 0)),
        ({"bits": 8}, (14, 2)),
        ({"layout": "exl3"}, (16, 2)),  # 14 states don't fit it
    ],
)
def test_the_best_quality_takes_what_the_own_options_allow(given, expected):
    options = choice_of(Choice("qtip", given), "best").create().options
    assert (options.states, options.sweeps) == expected


def test_progress_rises_to_the_end_with_each_block(layer):
    W, H = layer(32, 40)
    shares = []
    QTIP(Options(sweeps=1, **SMALL)).pack(W, Calibration(H, 10, progress=shares.append))
    assert shares == [block / 6 for block in range(1, 7)]  # three blocks of 16 columns, twice


def test_feedback_sweeps_states_and_bits_each_lower_the_proxy_error(layer):
    W, H = layer(128, 192)
    no_feedback = torch.eye(192)

    def found(hessian=H, **chosen):
        options = Options(**chosen)
        return error(packing.solve(W, hessian, options), W, H, options)

    base = found(sweeps=0, **SMALL)
    assert base < 0.9 * found(no_feedback, sweeps=0, **SMALL)
    assert found(sweeps=1, **SMALL) < base
    assert found(sweeps=0, states=12) < base
    by_bits = [found(bits=bits, sweeps=0, **SMALL) for bits in (1, 2, 3, 4)]
    assert all(more < 0.5 * fewer for fewer, more in itertools.pairwise(by_bits))


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (20, 33), (16, 64)])
def test_any_shape_packs_and_multiplies(shape, layer, generator):
    W, H = layer(*shape)
    quantizer = QTIP(Options(bits=3, **SMALL))
    packed = quantizer.pack(W, Calibration(H, 10))
    assert packed.layout == quantizer.layout(shape)
    dense = quantizer.dequantize_tile(packed, (0, shape[0]), torch.float64)
    for transpose, M in ((False, dense.T), (True, dense)):
        for rows in (1, 3):
            x = torch.randn(rows, len(M), generator=generator)
            expected = x.double() @ M
            y = quantizer.matmul(x, packed, transpose)
            assert (y - expected).norm() <= 1e-5 * x.double().norm() * dense.norm()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_layout_has_walks_and_vectors_alone(bits):
    for out, columns in ((64, 128), (128, 64)):
        tiles = out // 16 * columns // 16
        layout = QTIP(Options(bits=bits, states=10)).layout((out, columns))
        assert layout.nbytes == tiles * 32 * bits + 2 * (out + columns) + 4


@pytest.mark.parametrize("weight", ["zeros", "huge", "tiny"])
def test_weights_of_any_size_pack(weight, layer):
    W, H = layer(16, 32)
    W = W * {"zeros": 0.0, "huge": 1e30, "tiny": 1e-30}[weight]
    quantizer = QTIP(Options(bits=4, **SMALL))
    packed = quantizer.pack(W, Calibration(H, 10))
    dense = quantizer.dequantize_tile(packed, (0, 16), torch.float32)
    assert (dense - W).norm() <= 0.2 * W.norm()


def test_scales_multiply_into_the_packed_weight(layer, generator):
    W, H = layer(20, 36)
    quantizer = QTIP(Options(**SMALL))
    packed = quantizer.pack(W, Calibration(H, 10))
    u, v = (1 + 0.1 * torch.randn(n, generator=generator) for n in (36, 20))
    dense, scaled = (
        quantizer.dequantize_tile(p, (0, 20), torch.float64)
        for p in (packed, quantizer.rescaled(packed, u, v))
    )
    expected = v.double()[:, None] * dense * u.double()
    assert (scaled - expected).norm() < 2e-3 * expected.norm()


def test_bad_weights_and_second_moments_are_refused(layer):
    W, H = layer(16, 32)
    quantizer = QTIP()
    with pytest.raises(OptionError, match="expected a calibration"):
        quantizer.pack(W)
    with pytest.raises(ShapeError, match=r"expected a second moment of shape \[32, 32\]"):
        quantizer.pack(W, Calibration(torch.eye(31), 1))
    for bad in (torch.nan, torch.inf):
        broken = W.clone()
        broken[3, 4] = bad
        with pytest.raises(WeightError, match="expected a finite weight"):
            quantizer.pack(broken, Calibration(H, 1))


@pytest.mark.parametrize(
    "options",
    [{"bits": 0}, {"bits": 9}, {"states": 9}, {"states": 17}, {"bits": 7, "states": 12},
     {"code": "hyb"}, {"codebook_scale": 0}, {"sweeps": -1}],
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError):
        Options(**options)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_has_a_default_for_states(bits):
    options = Options(bits=bits)
    assert options.states == max(12, bits + 6)
    assert Options(**options.model_dump()) == options


def packed_with(**changes):
    metadata = {"bits": 2, "states": 12, "code": "bytes", "hadamard": "full"} | changes
    layouts = tensors((20, 36), 2, 12, "bytes", "full")
    held = {n: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for n, t in layouts.items()}
    return PackedWeight("qtip", 1, (20, 36), held, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "bits: expected 1 to 8, got 9"),
        ({"bits": 0}, "bits: expected 1 to 8, got 0"),
        ({"bits": 2.0}, "expected values of bits, states, code, hadamard"),
        ({"bits": 3}, r"expected trellis as int16 \[3, 2, 48\], got int16 \[3, 2, 32\]"),
        ({"states": 17}, "states: expected 2 to 16, got 17"),
        ({"code": "mcg,mul1"}, "code: expected one of"),
        ({"hadamard": "64"}, "hadamard: expected one of full, 128"),
        ({"more": 1}, "expected values of"),
    ],
)
def test_tensors_that_do_not_fit_their_metadata_are_refused(changes, message):
    packed = packed_with(**changes)
    with pytest.raises(CheckpointError, match=message):
        QTIP().check_format(packed)
    with pytest.raises(CheckpointError, match=message):
        QTIP().matmul(torch.ones(1, 36), packed)


def test_a_solution_of_another_size_is_refused(random_solution):
    solution = random_solution((20, 36), Options(bits=3))
    with pytest.raises(CheckpointError, match="expected trellis as"):
        packed_of(solution, (20, 36), Options(bits=2))
