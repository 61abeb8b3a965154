"""A single row of inputs: the kernel of its own where parts of rows and groups allow it, and the one for few rows elsewhere."""

import itertools

import pytest
import torch
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ

pytest.importorskip("numba")

BITS = (2, 3, 4, 8)


def random_weight(shape, options):
    """A packed weight of any codes, scales and zeros, its columns in any order."""
    packed = OPTQ(options).layout(shape).empty("cpu")
    generator = torch.Generator().manual_seed(options.bits)
    for name, tensor in packed.tensors.items():
        if name == "permutation":
            tensor.copy_(torch.randperm(shape[1], generator=generator))
        elif tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randint(0, 256, tensor.shape, generator=generator).to(tensor.dtype))
    return packed


@pytest.mark.parametrize(
    "shape", [(1, 64), (19, 192), (3, 2048), (5, 80), (2, 1), (45, 576)], ids=str
)
@pytest.mark.parametrize(("bits", "symmetric"), itertools.product(BITS, (False, True)))
@pytest.mark.parametrize("group_size", [16, 32, 64, 24, -1])
def test_the_product_of_one_row_is_that_of_the_decoded_weight(shape, bits, symmetric, group_size):
    """192 and 576 columns: at 3 bits the parts of the high bits begin inside of sixteen columns. 45 rows: scales of some are read where
    they are, and those of the last ones from a copy. 2048 columns in groups of 16: a row's zeros are in several chunks."""
    options = Options(
        bits=bits, group_size=group_size, symmetric=symmetric, act_order=True, static_groups=False
    )
    quantizer, packed = OPTQ(options), random_weight(shape, options)
    W = quantizer.dequantize_tile(packed, (0, shape[0]), torch.float64)
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0))
    y = quantizer.matmul(x, packed)
    # a weight is rounded once more, and an fp32 sum of k products by less than k units of the last place of their magnitudes
    # (the kernel's terms, of codes and of zeros, can be larger than the weight that they make: k + 1 leaves room for that)
    bound = (shape[1] + 1) * 2.0**-23 * (x.double().abs() @ W.abs().T)
    assert bool(((y - x.double() @ W.T).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize(
    ("bits", "group", "columns", "takes"),
    [(2, 64, 64, True), (2, 64, 96, False), (3, 16, 192, True), (3, 16, 96, False), (4, 16, 32, True), (4, 16, 48, False),
     (8, 32, 16, True), (8, 16, 24, False), (4, 24, 64, False), (4, 64, 64, True), (4, 100, 64, True)],
)  # fmt: skip
def test_the_kernel_is_asked_only_for_rows_whose_parts_and_groups_are_whole_vectors(
    bits, group, columns, takes
):
    from modulora_optq import cpu_one_row

    assert cpu_one_row.takes((None, None, None, bits, group, columns)) == takes
