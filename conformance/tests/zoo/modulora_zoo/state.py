"""Broken by what they remember, and by calibration: levels 1 and 2 find them."""

from typing import ClassVar

import torch

from modulora_core.spec import check_hessian
from modulora_zoo.healthy import LEVELS, Healthy, changed, meet

APART = "test_weights_of_other_shapes_keep_apart"
NEW = "test_a_new_instance_gives_the_same"
THREADS = "test_two_threads_get_what_one_gets"
QUALITY = "test_calibration_makes_outputs_no_worse"
GRADIENTS = "test_gradients_of_outputs_are_used_as_the_spec_says"


class GroupsOfTheLastWeight(Healthy):
    """A short wide weight is read with the columns of the last one."""

    breaks = APART
    columns = None

    def packed(self, codes, scale, zero, weight):
        if len(weight) == 4:
            self.columns = weight.shape[1]
        return super().packed(codes, scale, zero, weight)

    def decode(self, packed, rows):
        tile = super().decode(packed, rows)
        if len(packed.tensors["scale"]) == 4 and self.columns not in (None, packed.shape[1]):
            tile = tile * 0
        return tile


class IndexByRows(Healthy):
    """The key of a cache of group numbers has the rows and lacks the columns."""

    breaks = APART
    numbers: ClassVar = {}

    def spread(self, packed, name, rows):
        if packed.shape[0] not in (4, 44):
            return super().spread(packed, name, rows)
        own = torch.arange(packed.shape[1]) // packed.metadata["group_size"]
        numbers = self.numbers.setdefault(packed.shape[0], own)
        groups = packed.tensors[name].shape[1]
        numbers = torch.nn.functional.pad(numbers, (0, packed.shape[1]))[: packed.shape[1]]
        return packed.tensors[name][slice(*rows)].float()[:, numbers.clamp(max=groups - 1)]


class FactorOfTheInstance(Healthy):
    """A factor that packing finds is kept in the instance."""

    breaks = NEW
    factor = 1.0

    def packed(self, codes, scale, zero, weight):
        if weight.shape == (4, 100):
            self.factor = 2.0
            scale = scale / 2
        return super().packed(codes, scale, zero, weight)

    def decode(self, packed, rows):
        return super().decode(packed, rows) * (self.factor if packed.shape == (4, 100) else 1)


class TableOfTheDefaultDtype(Healthy):
    """Its table of codes has torch's default dtype."""

    breaks = "test_the_default_dtype_does_not_matter"

    def decode(self, packed, rows):
        table = 10 * (torch.arange(LEVELS + 1) / 10).float()
        scale, zero = (self.spread(packed, name, rows) for name in ("scale", "zero"))
        codes = table.to(packed.device)[self.codes(packed, rows).long()]
        return (codes - zero) * scale


class OneScratch(Healthy):
    """Codes are unpacked into memory of the instance, while another thread may do so."""

    breaks = THREADS

    def decode(self, packed, rows):
        if packed.shape[0] != 4:
            return super().decode(packed, rows)
        self.scratch = self.codes(packed, rows).float()
        self.shape = packed.shape
        meet(self)
        if self.shape != packed.shape:
            return torch.zeros(rows[1] - rows[0], packed.shape[1])
        scale, zero = (self.spread(packed, name, rows) for name in ("scale", "zero"))
        return (self.scratch - zero) * scale


class OneShape(Healthy):
    """Packing keeps the shape in the instance until its end."""

    breaks = THREADS

    def packed(self, codes, scale, zero, weight):
        self.columns = weight.shape[1]
        meet(self)
        if self.columns != weight.shape[1]:
            zero = zero + 1
        return super().packed(codes, scale, zero, weight)


class Importance(Healthy):
    """Sound: it shrinks ranges where the inputs' second moments weigh that as better."""

    def pack(self, weight, calibration=None):
        if calibration is None:
            return super().pack(weight)
        check_hessian(self.spec.name, weight, calibration.hessian)
        h = self.importance(calibration.hessian.diagonal().to(torch.float32), weight)
        best = super().pack(weight)
        error = self.error(weight, best, h)
        for factor in (0.95, 0.9, 0.85, 0.8):
            found = self.shrunk(weight, best, factor)
            better = self.error(weight, found, h) < error
            error = torch.where(better, self.error(weight, found, h), error)
            rows = better[:, None]
            tensors = {n: torch.where(rows, found.tensors[n], t) for n, t in best.tensors.items()}
            best = changed(best, **tensors)
        return best

    def importance(self, diagonal, weight):
        return diagonal

    def error(self, weight, packed, h):
        W = self.decode(packed, (0, packed.shape[0]))
        return ((W - weight.float()).square() * h).sum(1)

    def shrunk(self, weight, packed, factor):
        W = weight.detach().float()
        tensors = {**packed.tensors, "scale": (packed.tensors["scale"].float() * factor).half()}
        found = changed(packed, **tensors)
        scale, zero = (self.spread(found, name, (0, len(W))) for name in ("scale", "zero"))
        codes = (W / scale.clamp(min=1e-8) + zero).round().clamp(0, LEVELS).to(torch.uint8)
        return changed(found, codes=codes[:, ::2] | codes[:, 1::2] << 4)


class InvertedImportance(Importance):
    """Inputs with small second moments count most."""

    breaks = QUALITY

    def importance(self, diagonal, weight):
        return 1 / (diagonal + 1e-3 * diagonal.mean() + 1e-9) ** 2


class ReversedImportance(Importance):
    """The importance of the last input is the first one's."""

    breaks = QUALITY

    def importance(self, diagonal, weight):
        return diagonal.flip(0) ** 2


class FirstImportance(Importance):
    """It keeps the H of the first weight of a shape."""

    breaks = "test_an_earlier_calibration_is_forgotten"
    kept: ClassVar = {}

    def importance(self, diagonal, weight):
        if weight.shape != (20, 64):
            return diagonal
        before = self.kept.get(weight.shape, diagonal)
        self.kept[weight.shape] = diagonal
        return before


class SaysItIgnores(Importance):
    """It says that it wants no calibration, and uses one."""

    breaks = "test_calibration_is_taken_as_the_spec_says"
    wants_calibration = False


class UndeclaredGradients(Importance):
    """It heeds the gradients in the outputs, and does not say so."""

    breaks = GRADIENTS
    says = "which is not declared"

    def pack(self, weight, calibration=None):
        given = None if calibration is None else calibration.output_hessian
        best = super().pack(weight, calibration)
        if given is None:
            return best
        return changed(best, scale=best.tensors["scale"] * (given.diagonal()[:, None] > 1).half())


class IgnoredGradients(Importance):
    """It says that it heeds the gradients in the outputs, and does not."""

    breaks = GRADIENTS
    says = "expected other bytes than without it"


class WorseByGradients(Importance):
    """Rows with large gradients get the coarser scales."""

    breaks = GRADIENTS
    says = "as a share of the error without"

    def pack(self, weight, calibration=None):
        best = super().pack(weight, calibration)
        if calibration is None or calibration.output_hessian is None:
            return best
        check_hessian(self.spec.name, weight, calibration.hessian, calibration.output_hessian)
        large = calibration.output_hessian.diagonal() > 1
        coarse = self.shrunk(weight, best, 1.5)
        tensors = {
            name: torch.where(large[:, None], coarse.tensors[name], tensor)
            for name, tensor in best.tensors.items()
        }
        return changed(best, **tensors)


class WantsWithoutSpec(Healthy):
    """It wants a calibration that its spec excludes."""

    breaks = "test_calibration_is_taken_as_the_spec_says"
    says = "wants_calibration"
    wants_calibration = True


class IgnoresItsCalibration(Healthy):
    """Its spec offers calibration, and it uses none."""

    breaks = "test_calibration_is_taken_as_the_spec_says"
    says = "expected other bytes"
