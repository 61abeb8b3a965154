"""The method: incoherence, feedback, sweeps and bits; the fast solver against the reference."""

import itertools

import pytest
import torch
from modulora_kernels.incoherence import proxy_error
from modulora_qtip import packing, reference
from modulora_qtip.quantizer import QTIP
from modulora_qtip.reference import Options

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
