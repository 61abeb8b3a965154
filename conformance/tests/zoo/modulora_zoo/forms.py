"""Broken for views, slices, dimensions, NaN and Inf: level 3 finds them."""

from typing import ClassVar

import torch

from modulora_zoo.healthy import Healthy, _ChangesProducts, changed, rows_of

VIEWS = "test_strides_of_the_input_do_not_matter"
DIMENSIONS = "test_leading_dimensions_are_kept"
EMPTY = "test_zero_rows_give_zero_rows"
SLICES = "test_packed_tensors_may_be_slices"
BAD = "test_nan_and_inf_in_x_come_out"


class FromTheStoragesStart(Healthy):
    """It reads a contiguous x from the start of its storage."""

    breaks = VIEWS

    def matmul(self, x, packed, transpose=False):
        if x.is_contiguous() and x.storage_offset() and x.dim() == 2:
            x = torch.as_strided(x, x.shape, x.stride(), 0)
        return super().matmul(x, packed, transpose)


class TransposedInMemoryOrder(Healthy):
    """It reads a transposed matrix in memory order."""

    breaks = VIEWS

    def matmul(self, x, packed, transpose=False):
        if x.dim() == 2 and len(x) > 1 and x.stride() == (1, len(x)):
            x = torch.as_strided(x, x.shape, (x.shape[1], 1))
        return super().matmul(x, packed, transpose)


class WholeRowsOfAWiderMatrix(Healthy):
    """It takes the distance of rows for their length."""

    breaks = VIEWS

    def matmul(self, x, packed, transpose=False):
        if x.dim() == 2 and x.stride(-1) == 1 and x.stride(0) == x.shape[1] + 7 and len(x) > 1:
            x = torch.as_strided(x, x.shape, (x.shape[1], 1), x.storage_offset())
        return super().matmul(x, packed, transpose)


class FlipsFourDimensions(_ChangesProducts):
    breaks = DIMENSIONS

    def product(self, y, x, packed, transpose):
        return y.flip(0) if x.dim() == 4 and x.numel() else y


class RowsOfTheLastBatch(_ChangesProducts):
    """Of three dimensions with a first one above 16 it computes the first batch alone."""

    breaks = DIMENSIONS

    def product(self, y, x, packed, transpose):
        if x.dim() == 3 and x.shape[0] == 40 and x.shape[1] == 1:
            y[1:] = y[:1]
        return y


class EmptyHalfIsSingle(_ChangesProducts):
    breaks = EMPTY

    def product(self, y, x, packed, transpose):
        return y.float() if not x.numel() and x.dtype == torch.float16 else y


class NoEmptyFourDimensions(Healthy):
    """A reshape infers the rows of an x without elements."""

    breaks = EMPTY

    def matmul(self, x, packed, transpose=False):
        if not x.numel() and x.dim() == 4:
            x = x.reshape(-1, *x.shape[1:-1], 0)
        return super().matmul(x, packed, transpose)


class FirstOfAStack(Healthy):
    """It reads packed codes from the start of their storage."""

    breaks = SLICES

    def codes(self, packed, rows):
        codes = packed.tensors["codes"]
        if codes.storage_offset() and packed.shape == (41, 136):
            codes = torch.as_strided(codes, codes.shape, codes.stride(), 0)
            packed = changed(packed, codes=codes)
        return super().codes(packed, rows)


class OneWeightForAStorage(Healthy):
    """The key of a cache is the address of a storage, which a stack of experts shares."""

    breaks = SLICES
    kept: ClassVar = {}

    def matmul(self, x, packed, transpose=False):
        codes = packed.tensors["codes"]
        if packed.shape != (41, 136) or not codes.is_cpu or codes.untyped_storage().nbytes() < 5000:
            return super().matmul(x, packed, transpose)
        W = self.kept.setdefault("W", self.decode(packed, (0, 41)).double())
        return (x.double() @ (W if transpose else W.T)).to(x.dtype)


class SkipsNan(Healthy):
    breaks = BAD

    def matmul(self, x, packed, transpose=False):
        return super().matmul(x.nan_to_num(nan=0.0, posinf=torch.inf), packed, transpose)


class ClampsInf(Healthy):
    breaks = BAD

    def matmul(self, x, packed, transpose=False):
        most = torch.finfo(x.dtype).max
        return super().matmul(x.clamp(-most, most), packed, transpose)


class SpreadsNan(_ChangesProducts):
    """A NaN in a row reaches the other rows."""

    breaks = BAD

    def product(self, y, x, packed, transpose):
        return y + 0 * y.sum() if rows_of(x) == 40 and not bool(y.isfinite().all()) else y
