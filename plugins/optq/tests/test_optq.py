"""The optq quantizer: layouts, refusals, permutations, and the solver's result, packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulora_conformance.compiled_kernels import SHAPES, CompiledKernels
from modulora_optq import solver
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution, to_solution

from modulora_core.errors import CheckpointError
from modulora_core.spec import Calibration, PackedWeight

BITS = (2, 3, 4, 8)


@settings(max_examples=30, deadline=None)
@given(
    options=st.builds(
        Options,
        bits=st.sampled_from(BITS),
        group_size=st.sampled_from((16, 64, -1)),
        symmetric=st.booleans(),
        act_order=st.booleans(),
        static_groups=st.booleans(),
        range_search=st.booleans(),
        damping=st.just(0.1),
    ),
    shape=st.sampled_from([(1, 16), (3, 7), (17, 129), (5, 1), (0, 16), (4, 0)]),
)
def test_the_tile_is_the_solvers_result_in_the_announced_layout(options, shape):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator)
    x = torch.randn(4 * shape[1], shape[1], generator=generator)
    seen = Calibration(x.t() @ x / max(1, len(x)), len(x))
    packed = OPTQ(options).pack(w, seen)
    assert OPTQ(options).layout(shape) == packed.layout
    tile = OPTQ(options).dequantize_tile(packed, (0, shape[0]), torch.float32)
    assert torch.equal(tile, solver.solve(w, seen.hessian, options).dequantize(options))


@pytest.fixture
def permuted(random_solution):
    return from_solution(random_solution((8, 100), Options(), True), Options())


def edited(packed, tensors=(), metadata=()):
    changed = {**packed.tensors, **dict(tensors)}
    return PackedWeight("optq", 1, packed.shape, changed, {**packed.metadata, **dict(metadata)})


def assert_refused(packed, message):
    """By each function that reads it: if this fails, a kernel may read out of bounds."""
    out_features, in_features = packed.shape
    with pytest.raises(CheckpointError, match=message):
        OPTQ().dequantize_tile(packed, (0, out_features), torch.float32)
    for rows in (1, 50):
        with pytest.raises(CheckpointError, match=message):
            OPTQ().matmul(torch.ones(rows, in_features), packed)
    with pytest.raises(CheckpointError, match=message):
        OPTQ().matmul(torch.ones(1, out_features), packed, True)
    with pytest.raises(CheckpointError, match=message):
        to_solution(packed)


@pytest.mark.parametrize("value", [-1, 100, 2**31 - 1, 5], ids=["negative", "next", "far", "twice"])
def test_a_permutation_that_leaves_a_column_out_is_refused(value, permuted):
    wrong = torch.arange(100, dtype=torch.int32)
    wrong[42] = value
    assert_refused(edited(permuted, {"permutation": wrong}), "expected a permutation of its 100")


def test_a_permutation_that_changes_after_a_product_is_read_again(permuted):
    optq, x, columns = OPTQ(), torch.randn(2, 100), permuted.tensors["permutation"]
    before = optq.matmul(x, permuted)
    columns.copy_(columns.flip(0))
    tile = optq.dequantize_tile(permuted, (0, 8), x.dtype)
    torch.testing.assert_close(optq.matmul(x, permuted), x @ tile.t())
    assert not torch.allclose(optq.matmul(x, permuted), before)
    columns[42] = columns[43]
    with pytest.raises(CheckpointError, match="expected a permutation of its 100 columns"):
        optq.matmul(x, permuted)


class TestKernels(CompiledKernels):
    """Mapped files, the end of memory, other processors, several threads."""

    instruction_sets = ("avx2",)  # the core and nf4 compare code without AVX2
    loops_of_core = True

    @pytest.fixture
    def quantizers(self):
        return [OPTQ(Options(bits=bits)) for bits in BITS]

    @pytest.fixture
    def weights(self, random_solution):
        """Every code and zero, permuted or not, with a scale for each 16 columns."""
        found = []
        for bits in BITS:
            options = Options(bits=bits, group_size=16)
            for i, shape in enumerate(SHAPES):
                solution = random_solution(shape, options, permuted=i % 2 == 1)
                found.append((OPTQ(options), from_solution(solution, options)))
        return found
