"""The method: incoherence, feedback, sweeps and bits; the fast solver against the reference."""

import itertools

import torch
from modulora_kernels.incoherence import proxy_error
from modulora_qtip import packing, reference
from modulora_qtip.reference import Options

SMALL = {"states": 10}


def error(solution, W, H, options):
    return proxy_error(W, solution.dequantize(options), H)


def test_the_fast_solver_is_as_good_as_the_reference(layer):
    W, H = layer(32, 40)
    for sweeps in (0, 1):
        options = Options(sweeps=sweeps, **SMALL)
        exact, fast = (error(m.solve(W, H, options), W, H, options) for m in (reference, packing))
        assert fast < 1.1 * exact


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
