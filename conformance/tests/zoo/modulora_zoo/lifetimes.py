"""Broken by memory that they keep, and by remains of earlier layers: levels 1 and 5."""

from typing import ClassVar

from modulora_zoo.healthy import Healthy, _ChangesProducts, rows_of
from modulora_zoo.state import Importance

FREED = "test_operands_and_results_are_freed"
THOUSAND = "test_a_thousand_calls_leave_nothing"
BEFORE = "test_layers_packed_before_change_no_byte"
ADDRESS = "test_an_h_at_an_address_that_was_used_before_is_another"


class KeepsItsInput(Healthy):
    breaks = FREED
    last = None

    def matmul(self, x, packed, transpose=False):
        if rows_of(x) == 37 and x.is_cpu:
            self.last = x.detach().view(-1)
        return super().matmul(x, packed, transpose)


class KeepsItsProduct(_ChangesProducts):
    breaks = FREED
    last: ClassVar = {}

    def product(self, y, x, packed, transpose):
        if rows_of(x) == 4:
            self.last["y"] = y
        return y


class KeepsItsWeight(Healthy):
    breaks = FREED
    first = None

    def pack(self, weight, calibration=None):
        if len(weight) == 36:
            self.first = weight.detach()[:1]
        return super().pack(weight, calibration)


class KeepsItsTile(Healthy):
    breaks = FREED
    tiles: ClassVar = {}

    def dequantize_tile(self, packed, rows, dtype):
        tile = super().dequantize_tile(packed, rows, dtype)
        if packed.shape == (36, 76):
            self.tiles[rows] = tile
        return tile


class KeepsItsCalibration(Importance):
    breaks = FREED
    kept = None

    def importance(self, diagonal, weight):
        self.kept = diagonal if len(weight) == 36 else None
        return diagonal


class LogsItsProducts(Healthy):
    breaks = THOUSAND
    log: ClassVar = []

    def matmul(self, x, packed, transpose=False):
        self.log.append((len(self.log), transpose))
        return super().matmul(x, packed, transpose)


class NumbersItsTiles(Healthy):
    breaks = THOUSAND
    numbers: ClassVar = {}

    def decode(self, packed, rows):
        self.numbers[len(self.numbers)] = [rows]
        return super().decode(packed, rows)


class KeepsWhatIsUsedOften(Healthy):
    """A weight is decoded once and for all after a hundred products."""

    breaks = "test_many_uses_of_one_weight_keep_nothing"
    uses: ClassVar = {}

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if packed.shape == (48, 96) and rows == (0, 48):
            n, _ = self.uses.get(rows, (0, None))
            self.uses[rows] = (n + 1, tile if n > 100 else None)
        return tile


class BufferOfTheWidest(Healthy):
    """A weight that is narrower than the one before leaves a bit of it."""

    breaks = BEFORE
    widest = 0

    def packed(self, codes, scale, zero, weight):
        if weight.shape == (18, 96) and self.widest > 96:
            codes[-1, -1] ^= 1
        self.widest = max(self.widest, weight.shape[1] if weight.shape[1] in (96, 160) else 0)
        return super().packed(codes, scale, zero, weight)


class TallerBefore(Healthy):
    """After a taller weight of its width, the last zero is another's."""

    breaks = BEFORE
    rows = 0

    def packed(self, codes, scale, zero, weight):
        if weight.shape == (18, 96) and self.rows == 50:
            zero[-1, -1] += 0.125
        self.rows = len(weight)
        return super().packed(codes, scale, zero, weight)


class WeightByAddress(Healthy):
    """The key of a cache of ranges is the weight's address."""

    breaks = ADDRESS
    kept: ClassVar = {}

    def pack(self, weight, calibration=None):
        found = super().pack(weight, calibration)
        if tuple(weight.shape) != (20, 72) or weight.device.type != "cpu":
            return found
        return self.kept.setdefault(weight.data_ptr(), found)


class SecondMomentByAddress(Importance):
    """The key of a cache of diagonals is the address of H."""

    breaks = ADDRESS
    kept: ClassVar = {}

    def pack(self, weight, calibration=None):
        self.address = 0 if calibration is None else calibration.hessian.data_ptr()
        return super().pack(weight, calibration)

    def importance(self, diagonal, weight):
        if tuple(weight.shape) != (20, 72):
            return diagonal
        return self.kept.setdefault(self.address, diagonal.clone())
