"""L2: weights move to other points of a packed weight's grid."""

from __future__ import annotations

import pytest
import torch
from modulora_kernels.feedback import RoundsBlocks
from torch import Tensor

from modulora_conformance.cases import SPREAD, correlated, generator, packed, tile
from modulora_conformance.changes import check_same_bytes, clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.accuracy import usual_error
from modulora_conformance.levels.tiles import RANGES
from modulora_conformance.oracle import relative_error
from modulora_conformance.results import NOT_OFFERED, Measurements
from modulora_core.errors import PluginError
from modulora_core.spec import PackedWeight, Quantizer

STAYS = "test_a_point_of_the_grid_snaps_to_itself"

ONE_ROUNDING = 2.0**-20
"""A point may be computed in another order than a tile."""


class Snapped(Level):
    """`snap` and `snapped` keep the grid of a packed weight, if `snaps` is true."""

    level, title = "L2", "tiles"

    @needs(RANGES)
    def test_a_point_of_the_grid_snaps_to_itself(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: `snap` rounds a point of the grid, such as Ŵ, to another value.

        Round to the points that the packed weight's scales and zeros give, with every digit of
        them. Without a grid inherit `snaps`, `snap` and `snapped`.
        """
        weight, V = _case(quantizer)
        once = _snap(quantizer, weight, V)
        assert torch.equal(_snap(quantizer, weight, once), once), (
            "snap(snap(V)): expected snap(V), got other values"
        )
        W = tile(quantizer, weight)
        error = relative_error(_snap(quantizer, weight, W), W)
        measurements.at_most("Ŵ snapped", error, ONE_ROUNDING)

    @needs(STAYS)
    def test_no_packed_point_is_nearer_than_the_snapped_one(self, quantizer: Quantizer) -> None:
        """If this fails: `snap` takes a farther point than the packed one.

        Round to nearest: not down, and not to a coarser grid.
        """
        weight, V = _case(quantizer)
        W = tile(quantizer, weight)
        found, before = ((each - V).abs() for each in (_snap(quantizer, weight, V), W))
        farther = int((found > before + ONE_ROUNDING * W.abs().max()).sum())
        assert farther == 0, (
            f"{farther} of {V.numel()} weights: expected the nearest point, got one that is "
            "farther than the packed one"
        )

    @needs(STAYS)
    def test_any_rows_and_columns_snap_as_the_whole(self, quantizer: Quantizer) -> None:
        """If this fails: `snap` takes scales of other rows or columns than it was asked for.

        Count both ranges from the first row and column of Ŵ in the original basis.
        """
        weight, V = _case(quantizer)
        whole, (rows, columns) = _snap(quantizer, weight, V), weight.shape
        parts = [((0, rows), (j, j + 1)) for j in (0, 1, columns // 2, columns - 1)]
        parts += [((rows // 2, rows), (columns // 3, columns)), ((1, 2), (0, columns))]
        for some_rows, some_columns in parts:
            at = slice(*some_rows), slice(*some_columns)
            found = quantizer.snap(weight, some_rows, some_columns, V[at].clone())
            assert torch.equal(found, whole[at]), (
                f"rows {some_rows} and columns {some_columns}: expected the points of the whole, "
                "got others"
            )

    @needs(STAYS)
    def test_a_snapped_weight_keeps_its_grid(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: `snapped` changes scales or zeros, gives other points, or writes to Ŵ.

        Copy all tensors but the codes. Do not call `pack`. The same holds for `rounded`, where
        weights of several columns share a code: Ŵ changes no byte, and another V codes alone. A V
        with the same scales and other codes is found again, as closely as `pack` would.
        """
        if isinstance(quantizer, RoundsBlocks):
            _check_rounded(quantizer, measurements)
            return
        weight, V = _case(quantizer)
        before, points = clone(weight), _snap(quantizer, weight, V)
        found = quantizer.snapped(weight, V)
        check_same_bytes(before, weight, "the packed weight after snapping")
        assert found.layout == weight.layout, (
            f"snapped: expected the layout {weight.layout}, got {found.layout}"
        )
        error = relative_error(tile(quantizer, found), points)
        measurements.at_most("a snapped weight", error, ONE_ROUNDING)
        assert torch.equal(_snap(quantizer, found, V), points), (
            "the snapped weight: expected the grid that it had, got another one"
        )
        back = tile(quantizer, quantizer.snapped(found, tile(quantizer, weight)))
        assert torch.equal(back, tile(quantizer, weight)), (
            "snapped, and back to Ŵ: expected Ŵ bit for bit, got other values"
        )


def _check_rounded(quantizer: RoundsBlocks, measurements: Measurements) -> None:
    weight = packed(quantizer, (40, 96))
    before, W = clone(weight), tile(quantizer, weight)
    H = correlated(weight.shape[1], 52).hessian
    same = quantizer.rounded(weight, W, H, damping=0.01, sweeps=1)
    check_same_bytes(before, same, "Ŵ rounded")
    V = W + SPREAD / 4 * torch.randn(W.shape, generator=generator(51))
    found = quantizer.rounded(weight, V, H, damping=0.01, sweeps=1)
    check_same_bytes(before, weight, "the packed weight after rounding")
    check_same_bytes(before, clone(found, **_codes(before)), "scales after rounding")
    errors = (V - tile(quantizer, found), V - W)
    left, given = (float((E @ H * E).sum()) for E in errors)
    assert left < given, f"rounded: expected an error below that of Ŵ, {given:.3g}, got {left:.3g}"
    V = tile(quantizer, clone(weight, **_codes(packed(quantizer, (40, 96), 53))))
    error = relative_error(
        tile(quantizer, quantizer.rounded(weight, V, H, damping=0.01, sweeps=1)), V
    )
    measurements.at_most("other codes found by rounding", error, usual_error(quantizer))


def _codes(weight: PackedWeight) -> dict[str, Tensor]:
    return {name: t for name, t in weight.tensors.items() if not t.is_floating_point()}


def _case(quantizer: Quantizer) -> tuple[PackedWeight, Tensor]:
    """A packed weight, and a V between points of its grid, fp32 ``[out, in]``. Or skip."""
    weight = packed(quantizer, (40, 96))
    W = tile(quantizer, weight)
    V = W + SPREAD / 4 * torch.randn(W.shape, generator=generator(51))
    if not quantizer.snaps:
        with pytest.raises(PluginError):
            _snap(quantizer, weight, V)
        with pytest.raises(PluginError):
            quantizer.snapped(weight, V)
        pytest.skip(f"{NOT_OFFERED}snaps is false")
    return weight, V


def _snap(quantizer: Quantizer, weight: PackedWeight, V: Tensor) -> Tensor:
    rows, columns = weight.shape
    return quantizer.snap(weight, (0, rows), (0, columns), V.clone())
