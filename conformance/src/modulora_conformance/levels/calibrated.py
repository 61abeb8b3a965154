"""L1: a quantizer uses the calibration that its spec asks for, and gains from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from modulora_conformance.cases import correlated, fit, gaussian, identity, pack, second_moment
from modulora_conformance.changes import check_same_bytes, same_packed
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.packing import DETERMINISTIC
from modulora_conformance.oracle import dense, relative_error
from modulora_conformance.results import NOT_OFFERED
from modulora_core.errors import ModuLoRAError, ShapeError
from modulora_core.spec import Calibration, Quantizer

TAKEN = "test_calibration_is_taken_as_the_spec_says"
REMEMBERED = "test_an_earlier_calibration_is_forgotten"

NOISE = 1.02
"""The most of the output error without calibration: rounding of correlated inputs varies."""


class Calibrated(Level):
    """`pack` takes calibration as the spec says, survives any, and makes outputs no worse by it."""

    level, title = "L1", "packing"

    @needs(DETERMINISTIC)
    def test_calibration_is_taken_as_the_spec_says(self, quantizer):
        """If this fails: `pack` does not treat calibration as the spec and the options say.

        "required" refuses to pack without. "optional" packs with and without. "none", and options
        for which `wants_calibration` is false, give the same bytes with and without.
        """
        weight = gaussian(fit(quantizer, 24, 64), 8)
        if quantizer.spec.calibration == "required":
            with pytest.raises(ModuLoRAError):
                quantizer.pack(weight, None)
        else:
            quantizer.pack(weight, None)
        found = quantizer.pack(weight, correlated(weight.shape[1]))
        assert not (quantizer.wants_calibration and quantizer.spec.calibration == "none"), (
            "wants_calibration: expected False, as spec.calibration is none, got True"
        )
        ignored = quantizer.wants_calibration and quantizer.spec.calibration == "optional"
        assert not (ignored and same_packed(found, quantizer.pack(weight))), (
            "a calibration of correlated inputs: expected other bytes than without, got the same; "
            "use it, or override wants_calibration"
        )
        if not quantizer.wants_calibration:
            origin = "packed with a calibration, which the quantizer does not want"
            check_same_bytes(pack(quantizer, weight), found, origin)

    @pytest.mark.parametrize("case", ["singular", "dead inputs", "no samples", "zero", "misfit"])
    @needs(TAKEN)
    def test_any_second_moment_is_survived(self, quantizer, case):
        """If this fails: an H from real data breaks `pack`, or makes values that are not finite.

        H may be singular (fewer samples than inputs). Some inputs may always be zero. An expert may
        get no token (samples 0, H the identity). `check_hessian` refuses an H that does not fit.
        """
        _skip_without_calibration(quantizer)
        weight = gaussian(fit(quantizer, 24, 64), 9)
        calibration = second_moment(case, weight.shape[1])
        if case == "misfit":
            with pytest.raises(ShapeError):
                quantizer.pack(weight, calibration)
            return
        W = dense(quantizer, quantizer.pack(weight, calibration))
        assert bool(W.isfinite().all()), f"{case}: expected finite values, got NaN or Inf"
        error = relative_error(W, weight)
        assert error < 1.5, (
            f"{case}: expected Ŵ near the weight, got a relative error of {error:.3g}"
        )

    @needs(TAKEN)
    def test_an_earlier_calibration_is_forgotten(self, quantizer):
        """If this fails: an H, or its factor, of an earlier weight is used for another weight.

        A cache's key is a shape or an address, or the instance keeps it. Keep nothing.
        """
        _skip_without_calibration(quantizer)
        weights = [gaussian(fit(quantizer, 20, 64), seed) for seed in (24, 25)]
        moments = [correlated(weights[0].shape[1], seed) for seed in (0, 7)]
        first = quantizer.pack(weights[0], moments[0])
        quantizer.pack(weights[1], moments[1])
        again = quantizer.pack(weights[0], moments[0])
        check_same_bytes(first, again, "packed again after a weight with another H")
        new = type(quantizer)(quantizer.options)
        new.pack(weights[1], moments[1])
        check_same_bytes(first, new.pack(weights[0], moments[0]), "packed by a new instance")

    @pytest.mark.parametrize("factor", [2.0**-12, 2.0**12], ids=lambda f: f"{f:g} H")
    @needs(TAKEN, REMEMBERED)
    def test_the_magnitude_of_h_has_no_effect(self, quantizer, factor):
        """If this fails: H times a power of two packs other bytes.

        Tokens are weighted, and users average differently. Divide H by the mean of its diagonal, so
        that damping is a share of it.
        """
        _skip_without_calibration(quantizer)
        for shape in ((20, 64), (5, 160)):
            weight = gaussian(fit(quantizer, *shape), 28)
            H = correlated(weight.shape[1], 8)
            expected = quantizer.pack(weight, H)
            found = quantizer.pack(weight, replace(H, hessian=factor * H.hessian))
            check_same_bytes(expected, found, f"packed with {factor:g} times H")

    @needs(TAKEN)
    def test_progress_runs_from_0_to_1(self, quantizer):
        """If this fails: `pack` tells a share of its work that is not from 0 to 1, or that falls.

        A bar of the command line then jumps.
        """
        _skip_without_calibration(quantizer)
        for shape in ((20, 64), (260, 136)):
            weight, shares = gaussian(fit(quantizer, *shape), 29), list[float]()
            H = replace(correlated(weight.shape[1], 9), progress=shares.append)
            quantizer.pack(weight, H)
            told = [round(share, 4) for share in shares]
            assert told == sorted(share for share in told if 0 <= share <= 1), (
                f"progress of a {list(weight.shape)} weight: expected rising shares from 0 to 1, "
                f"got {told[:8]}"
            )

    @needs(TAKEN, REMEMBERED)
    def test_calibration_makes_outputs_no_worse(self, quantizer, measurements):
        """If this fails: with the H of correlated inputs, outputs are further off than without H.

        The error is E‖(W − Ŵ) x‖², as a share of the error without H (required: with H = 1, which
        rounds to nearest). H is used inverted, permuted or transposed, or damped too little.
        """
        _skip_without_calibration(quantizer)
        weight = gaussian(fit(quantizer, 64, 128), 26)
        calibration = correlated(weight.shape[1], 3)
        with_it = _output_error(quantizer, weight, calibration, calibration)
        required = quantizer.spec.calibration == "required"
        plain = identity(weight.shape[1]) if required else None
        without = _output_error(quantizer, weight, plain, calibration)
        name = "output error with calibration, as a share of the error without"
        measurements.at_most(name, with_it / max(without, 1e-300), NOISE)

    @needs(TAKEN, "test_calibration_makes_outputs_no_worse")
    def test_gradients_of_outputs_are_used_as_the_spec_says(self, quantizer, measurements):
        """If this fails: `pack` does not treat the calibration's `output_hessian` as the spec says.

        Without `spec.output_hessian` it changes no byte. With it, tr(H_O E H Eᵀ) is no larger than
        without H_O. An H_O of zeros or of few tokens is survived, and a wrong shape is refused.
        `round_in_turn` of the kernels toolkit does this for any quantizer that rounds rows apart.
        """
        _skip_without_calibration(quantizer)
        weight = gaussian(fit(quantizer, 192, 64), 27)
        rows = weight.shape[0]
        plain, H_O = correlated(weight.shape[1], 3), correlated(rows, 4).hessian
        both = replace(plain, output_hessian=H_O)
        without, found = quantizer.pack(weight, plain), quantizer.pack(weight, both)
        if not quantizer.spec.output_hessian:
            check_same_bytes(without, found, "packed with an output_hessian, which is not declared")
            return
        assert not same_packed(without, found), (
            "an output_hessian of correlated gradients: expected other bytes than without it, got "
            "the same; use it, or leave spec.output_hessian False"
        )
        errors = [
            _output_error(quantizer, weight, given, plain, H_O.double()) for given in (both, plain)
        ]
        name = "error with the gradients' second moment, as a share of the error without"
        measurements.at_most(name, errors[0] / max(errors[1], 1e-300), NOISE)
        for case in ("zero", "singular"):
            few = replace(plain, output_hessian=second_moment(case, rows).hessian)
            W = dense(quantizer, quantizer.pack(weight, few))
            assert bool(W.isfinite().all()), f"{case}: expected finite values, got NaN or Inf"
        misfit = second_moment("misfit", rows).hessian
        with pytest.raises(ShapeError):
            quantizer.pack(weight, replace(plain, output_hessian=misfit))


def _output_error(
    quantizer: Quantizer,
    weight: Tensor,
    given: Calibration | None,
    inputs: Calibration,
    H_O: Tensor | None = None,
) -> float:
    """E‖(W − Ŵ) x‖² for inputs with the second moment of ``inputs``, or tr(H_O E H Eᵀ)."""
    error = weight.double() - dense(quantizer, quantizer.pack(weight, given))
    of_outputs = error @ inputs.hessian.double() @ error.T
    return float(of_outputs.trace() if H_O is None else (H_O * of_outputs).sum())


def _skip_without_calibration(quantizer: Quantizer) -> None:
    if quantizer.spec.calibration == "none":
        pytest.skip(f"{NOT_OFFERED}spec.calibration is none")
    if not quantizer.wants_calibration:
        pytest.skip(f"{NOT_OFFERED}these options use no calibration")
