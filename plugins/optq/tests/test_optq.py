"""What the optq quantizer promises: layouts, refusals, gradients, and that what it packs is what the solver found."""

from __future__ import annotations

import itertools

import pytest
import torch
from modulora_optq import SPEC, solver
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, codes_of, from_solution
from modulora_optq.reference import Solution
from torch import nn

from modulora_core.errors import CheckpointError, OptionError, ShapeError, WeightError
from modulora_core.layers import LoRALinear, PackedParameter, QuantLinear
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.tiles import tile_budget

BITS = (2, 3, 4, 8)
SHAPES = [(1, 16), (3, 7), (17, 129), (24, 64), (5, 1)]
OPTIONS = [
    Options(
        bits=bits, group_size=size, symmetric=symmetric, act_order=act_order, static_groups=static
    )
    for bits, size, symmetric, (act_order, static) in itertools.product(
        BITS, (16, 64, -1), (False, True), ((False, False), (True, False), (True, True))
    )
]


def name(value):
    if isinstance(value, Options):
        flags = "".join(
            f"-{flag}"
            for flag in ("symmetric", "act_order", "static_groups")
            if getattr(value, flag)
        )
        return f"{value.bits}bit-g{value.group_size}{flags}"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def calibration(in_features, generator):
    x = torch.randn(4 * in_features, in_features, generator=generator)
    return Calibration(x.t() @ x / len(x), len(x))


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_layout_equals_that_of_a_packed_weight(options, generator):
    for shape in SHAPES:
        packed = OPTQ(options).pack(
            torch.randn(shape, generator=generator), calibration(shape[1], generator)
        )
        assert OPTQ(options).layout(shape) == packed.layout


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_the_tile_is_what_the_solver_found(options, generator):
    for shape in SHAPES:
        w, seen = torch.randn(shape, generator=generator), calibration(shape[1], generator)
        found = solver.solve(w, seen.hessian, options)
        tile = OPTQ(options).dequantize_tile(
            OPTQ(options).pack(w, seen), (0, shape[0]), torch.float32
        )
        assert torch.equal(tile, found.dequantize(options))


def test_the_same_weight_gives_the_same_bytes(generator):
    w, seen = torch.randn(40, 200, generator=generator), calibration(200, generator)
    first, second = OPTQ().pack(w, seen), OPTQ().pack(w, seen)
    for key, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[key]), key


def test_packing_reads_any_strides_and_changes_nothing(generator):
    w, seen = torch.randn(50, 30, generator=generator).t(), calibration(50, generator)
    before = w.clone(), seen.hessian.clone()
    strided, contiguous = OPTQ().pack(w, seen), OPTQ().pack(w.contiguous(), seen)
    assert torch.equal(w, before[0])
    assert torch.equal(seen.hessian, before[1])
    for key, tensor in contiguous.tensors.items():
        assert torch.equal(tensor, strided.tensors[key]), key


def test_packed_tensors_share_no_memory_with_weight_or_calibration(generator):
    w, seen = torch.randn(4, 64, generator=generator), calibration(64, generator)
    packed = OPTQ().pack(w, seen)
    before = OPTQ().dequantize_tile(packed, (0, 4), torch.float32)
    w.zero_()
    seen.hessian.zero_()
    assert torch.equal(OPTQ().dequantize_tile(packed, (0, 4), torch.float32), before)


def test_without_calibration_nothing_is_packed():
    with pytest.raises(OptionError, match=r"optq: expected a calibration, got none .* \[2, 16\]"):
        OPTQ().pack(torch.ones(2, 16))


def test_a_second_moment_of_another_layer_is_refused():
    with pytest.raises(ShapeError, match=r"\[16, 16\]"):
        OPTQ().pack(torch.ones(2, 16), Calibration(torch.eye(17), 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(bad):
    w, H = torch.ones(2, 16), torch.eye(16)
    w[1, 7] = bad
    with pytest.raises(WeightError, match=r"optq: expected a finite weight"):
        OPTQ().pack(w, Calibration(H, 1))
    H[3, 3] = bad
    with pytest.raises(WeightError, match=r"optq: expected a finite second moment"):
        OPTQ().pack(torch.ones(2, 16), Calibration(H, 1))


@pytest.mark.parametrize("permuted", [False, True], ids=["own-order", "permuted"])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_an_adapted_layer_equal_those_of_the_dense_weight(
    bits, permuted, generator, random_solution
):
    options = Options(bits=bits, group_size=16)
    solution = random_solution((13, 40), options, permuted)
    layer = LoRALinear(
        QuantLinear(PackedParameter(OPTQ(options), from_solution(solution, options)))
    )
    layer.add_adapter("default", 2, alpha=4)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    nn.init.normal_(B, generator=generator)
    W = solution.dequantize(options)
    for rows in (3, 50):  # through the fused kernels, and through tiles
        x = torch.randn(rows, 40, generator=generator, requires_grad=True)
        weights = torch.randn(rows, 13, generator=generator)
        with tile_budget(4 * 40 * 5):  # five rows a tile, and the last one short
            got = torch.autograd.grad((layer(x) * weights).sum(), (x, A, B))
        dense = x @ W.t() + 2.0 * (x @ A.t()) @ B.t()
        expected = torch.autograd.grad((dense * weights).sum(), (x, A, B))
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_matmul_takes_any_leading_dimensions_and_strides(generator, random_solution):
    solution = random_solution((12, 20), Options(group_size=16), True)
    packed, W = (
        from_solution(solution, Options(group_size=16)),
        solution.dequantize(Options(group_size=16)),
    )
    x = torch.randn(20, 2, 3, generator=generator).permute(2, 1, 0)  # [3, 2, 20], not contiguous
    y = OPTQ().matmul(x, packed)
    assert y.shape == (3, 2, 12)
    torch.testing.assert_close(y, x @ W.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(OPTQ().matmul(y, packed, True), y @ W, rtol=1e-5, atol=1e-5)
    assert OPTQ().matmul(x[0, 0], packed).shape == (12,)


@pytest.mark.parametrize("permuted", [False, True], ids=["own-order", "permuted"])
def test_matmul_refuses_a_wrong_last_dimension(permuted, random_solution):
    packed = from_solution(random_solution((4, 20), Options(), permuted), Options())
    with pytest.raises(ShapeError, match=r"expected x of shape \[\.\.\., 20\], got \[2, 4\]"):
        OPTQ().matmul(torch.randn(2, 4), packed)
    with pytest.raises(ShapeError, match=r"expected x of shape \[\.\.\., 4\], got \[2, 20\]"):
        OPTQ().matmul(torch.randn(2, 20), packed, True)
    with pytest.raises(ShapeError, match=r"got \[\]"):
        OPTQ().matmul(torch.tensor(1.0), packed)


@pytest.mark.parametrize("rows", [(-1, 2), (0, 5), (3, 2)])
def test_rows_outside_of_the_weight_are_refused(rows, random_solution):
    packed = from_solution(random_solution((4, 16), Options()), Options())
    with pytest.raises(ShapeError, match="expected 0 <= start <= stop <= 4"):
        OPTQ().dequantize_tile(packed, rows, torch.float32)


def edited(packed, tensors=(), metadata=()):
    return PackedWeight(
        "optq",
        1,
        packed.shape,
        {**packed.tensors, **dict(tensors)},
        {**packed.metadata, **dict(metadata)},
    )


def assert_refused(packed, message):
    """By everything that would read it."""
    out_features, in_features = packed.shape
    with pytest.raises(CheckpointError, match=message):
        OPTQ().dequantize_tile(packed, (0, out_features), torch.float32)
    for transpose, given in ((False, in_features), (True, out_features)):
        for rows in (1, 50):
            with pytest.raises(CheckpointError, match=message):
                OPTQ().matmul(torch.ones(rows, given), packed, transpose)
    with pytest.raises(CheckpointError, match=message):
        codes_of(packed)


@pytest.mark.parametrize(
    "metadata",
    [{"bits": 8}, {"bits": 5}, {"bits": "many"}, {"group_size": 16}, {"group_size": 15}, {"group_size": -1},
     {"permuted": None}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_metadata_that_does_not_fit_the_tensors_is_refused_before_they_are_read(
    metadata, random_solution
):
    """If this fails: a checkpoint that was edited makes a kernel read beyond the end of its tensors."""
    packed = from_solution(random_solution((8, 100), Options(), True), Options())
    assert_refused(edited(packed, metadata=metadata), "optq weight")


@pytest.mark.parametrize("key", ["codes", "scales", "zeros", "permutation"])
def test_tensors_of_wrong_shape_dtype_or_none_are_refused(key, random_solution):
    packed = from_solution(random_solution((8, 100), Options(), True), Options())
    tensor = packed.tensors[key]
    assert_refused(edited(packed, {key: tensor[..., :-1]}), f"expected {key} as")
    assert_refused(edited(packed, {key: tensor.double()}), f"expected {key} as")
    without = {name: t for name, t in packed.tensors.items() if name != key}
    assert_refused(
        PackedWeight("optq", 1, packed.shape, without, packed.metadata),
        f"expected {key} as .* got none",
    )


@pytest.mark.parametrize("value", [-1, 100, 2**31 - 1, 5], ids=["negative", "next", "far", "twice"])
def test_a_permutation_that_leaves_a_column_out_is_refused(value, random_solution):
    packed = from_solution(random_solution((8, 100), Options(), True), Options())
    wrong = torch.arange(100, dtype=torch.int32)
    wrong[42] = value
    assert_refused(
        edited(packed, {"permutation": wrong}), "expected a permutation of its 100 columns"
    )
    solution = codes_of(packed)
    with pytest.raises(CheckpointError, match="permutation"):
        from_solution(Solution(solution.codes, solution.scales, solution.zeros, wrong), Options())


def test_a_permutation_that_is_changed_after_a_product_is_seen(random_solution):
    packed = from_solution(random_solution((8, 100), Options(), True), Options())
    optq, x, columns = OPTQ(Options()), torch.randn(2, 100), packed.tensors["permutation"]
    before = optq.matmul(x, packed)
    columns.copy_(columns.flip(0))
    rows = (0, 8)
    torch.testing.assert_close(
        optq.matmul(x, packed), x @ optq.dequantize_tile(packed, rows, x.dtype).t()
    )
    assert not torch.allclose(optq.matmul(x, packed), before)
    columns[42] = columns[43]
    with pytest.raises(CheckpointError, match="expected a permutation of its 100 columns"):
        optq.matmul(x, packed)


def test_codes_that_the_bits_can_not_hold_are_refused(random_solution):
    solution = random_solution((3, 20), Options(bits=4))
    with pytest.raises(CheckpointError, match="expected codes of 3 bits, uint8 from 0 to 7"):
        from_solution(solution, Options(bits=3))
    with pytest.raises(
        CheckpointError, match="expected zeros of 8 in a symmetric weight of 4 bits"
    ):
        from_solution(solution, Options(bits=4, symmetric=True))


def test_the_tile_belongs_to_the_caller(random_solution):
    packed = from_solution(random_solution((4, 64), Options()), Options())
    before = {key: tensor.clone() for key, tensor in packed.tensors.items()}
    OPTQ().dequantize_tile(packed, (0, 4), torch.float32).zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in packed.tensors.items())


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0)], ids=name)
def test_a_weight_without_rows_or_columns_is_packed_and_multiplied(shape):
    packed = OPTQ().pack(torch.ones(shape), Calibration(torch.eye(shape[1]), 1))
    assert packed.layout == OPTQ().layout(shape)
    assert OPTQ().dequantize_tile(packed, (0, shape[0]), torch.float16).shape == shape
    assert torch.equal(OPTQ().matmul(torch.ones(3, shape[1]), packed), torch.zeros(3, shape[0]))
    assert torch.equal(
        OPTQ().matmul(torch.ones(3, shape[0]), packed, True), torch.zeros(3, shape[1])
    )


def test_the_quantizer_is_what_its_spec_says():
    assert OPTQ.spec is SPEC
    assert issubclass(OPTQ, Quantizer)
    assert SPEC.location == f"{OPTQ.__module__}:{OPTQ.__name__}"
    assert SPEC.bits == BITS


def test_bits_per_weight_count_scales_zeros_and_permutation():
    def bits_per_weight(**options):
        return OPTQ(Options(**options)).layout((2048, 2048)).bits_per_weight

    own_order = {"group_size": 64, "act_order": False}
    assert bits_per_weight(bits=3, symmetric=False, **own_order) == 3 + (16 + 3) / 64
    assert bits_per_weight(bits=3, symmetric=True, **own_order) == 3 + 16 / 64
    assert bits_per_weight(bits=2, symmetric=False, **own_order) == 2 + (16 + 2) / 64
    permuted = {"group_size": 64, "act_order": True, "static_groups": False}
    assert bits_per_weight(bits=4, symmetric=False, **permuted) == 4 + (16 + 4) / 64 + 32 / 2048
