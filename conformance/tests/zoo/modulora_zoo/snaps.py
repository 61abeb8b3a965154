"""L2: quantizers that move weights on the grid of a packed one, and one that does it right."""

import torch
from modulora_kernels import feedback

from modulora_zoo.healthy import LEVELS, Healthy, changed


class Snapping(Healthy):
    """Sound: the nearest of the 16 points of each group."""

    snaps = True

    def snap(self, packed, rows, columns, V):
        scale, zero = self.of_columns(packed, rows, columns)
        return (self.nearest(V / scale.clamp(min=1e-8) + zero) - zero) * scale

    def of_columns(self, packed, rows, columns):
        return (self.spread(packed, name, rows)[:, slice(*columns)] for name in ("scale", "zero"))

    def nearest(self, at):
        return at.round().clamp(0, LEVELS)

    def snapped(self, packed, V):
        scale, zero = self.of_columns(packed, (0, packed.shape[0]), (0, packed.shape[1]))
        codes = self.nearest(V / scale.clamp(min=1e-8) + zero).to(torch.uint8)
        return changed(packed, codes=codes[:, ::2] | codes[:, 1::2] << 4)


class SnapsHalfway(Snapping):
    breaks = "test_a_point_of_the_grid_snaps_to_itself"
    says = "expected snap(V), got other values"

    def snap(self, packed, rows, columns, V):
        return (super().snap(packed, rows, columns, V) + V) / 2


class SnapsDown(Snapping):
    """Zero points are no whole numbers here, so a point is a little above or below a code."""

    breaks = "test_no_packed_point_is_nearer_than_the_snapped_one"

    def nearest(self, at):
        return (at + 0.01).floor().clamp(0, LEVELS)


class SnapsToFirstColumns(Snapping):
    """The scales of columns from the first one on."""

    breaks = "test_any_rows_and_columns_snap_as_the_whole"

    def of_columns(self, packed, rows, columns):
        return super().of_columns(packed, rows, (0, columns[1] - columns[0]))


class SnapsToFirstRows(Snapping):
    """The scales of rows from the first one on."""

    breaks = "test_any_rows_and_columns_snap_as_the_whole"

    def of_columns(self, packed, rows, columns):
        return super().of_columns(packed, (0, rows[1] - rows[0]), columns)


class SnapsByPacking(Snapping):
    """Packs again, with new scales."""

    breaks = "test_a_snapped_weight_keeps_its_grid"

    def snapped(self, packed, V):
        return self.pack(V)


class SnapsInPlace(Snapping):
    breaks = "test_a_snapped_weight_keeps_its_grid"
    says = "the packed weight after snapping"

    def snapped(self, packed, V):
        packed.tensors["codes"].copy_(super().snapped(packed, V).tensors["codes"])
        return packed


class Rounding(feedback.RoundsBlocks, Snapping):
    """Sound: it rounds with feedback itself."""

    def rounded(self, packed, V, hessian, *, damping, sweeps):
        def snap(j, values):
            return self.snap(packed, (0, len(V)), (j, j + 1), values)

        points = feedback.rounded(self.spec.name, V, hessian, snap, damping=damping, sweeps=sweeps)
        return self.snapped(packed, points)


class RoundsWithNewScales(Rounding):
    breaks, says = "test_a_snapped_weight_keeps_its_grid", "scales after rounding"

    def rounded(self, packed, V, hessian, **options):
        return self.pack(V)


class RoundsToFartherPoints(Rounding):
    breaks, says = "test_a_snapped_weight_keeps_its_grid", "other codes found by rounding"

    def rounded(self, packed, V, hessian, **options):
        points = super().rounded(packed, V, hessian, **options).tensors["codes"]
        return changed(packed, codes=torch.where(points > 0xE0, packed.tensors["codes"], points))


class RoundsSomeRows(Rounding):
    """The last rows stay."""

    breaks, says = "test_a_snapped_weight_keeps_its_grid", "other codes found by rounding"

    def rounded(self, packed, V, hessian, **options):
        codes = super().rounded(packed, V, hessian, **options).tensors["codes"]
        return changed(packed, codes=torch.cat([codes[:32], packed.tensors["codes"][32:]]))


class RoundsOnAndOn(Rounding):
    """Each rounding moves the first code, so that a second one changes what the first one made."""

    breaks, says = "test_a_snapped_weight_keeps_its_grid", "Ŵ rounded"

    def rounded(self, packed, V, hessian, **options):
        codes = super().rounded(packed, V, hessian, **options).tensors["codes"]
        codes[0, 0] ^= 1
        return changed(packed, codes=codes)


class RoundsTheOtherWay(Rounding):
    """It subtracts what an adapter adds."""

    breaks, says = "test_a_snapped_weight_keeps_its_grid", "expected an error below that of Ŵ"

    def rounded(self, packed, V, hessian, **options):
        W = self.decode(packed, (0, packed.shape[0]))
        return super().rounded(packed, 2 * W - V, hessian, **options)
