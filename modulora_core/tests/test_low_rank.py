"""Products with a factor of small rank: in float64 against the definition, by torch and by the kernels, and what they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modulora_core import kernels, low_rank
from modulora_core.memory import Allocations

SHAPES = [(1, 5), (16, 1), (17, 31), (40, 576), (33, 1100)]
"""Fewer rows than kernels take, whole blocks and panels and parts of them."""

ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


@pytest.fixture(params=["compiled", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(low_rank, "_kernels", lambda *_, **__: None)
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def made(n: int, d: int, rank: int, dtype: torch.dtype, masked: bool) -> tuple[Tensor, ...]:
    """X, A or W, U or V, and what is kept, with the whole mask as numbers beside."""
    generator = torch.Generator().manual_seed(n + d + rank)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(n, d, generator=generator).to(dtype)
    A, V = (torch.randn(shape, generator=generator).to(factor) for shape in ((rank, d), (n, rank)))
    keep = torch.rand(n, d, generator=generator) < 0.7 if masked else torch.ones(n, d, dtype=torch.bool)
    return x, A, V, keep


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_they_are_what_they_say(
    route: str, dtype: torch.dtype, n: int, d: int, rank: int, masked: bool
) -> None:
    x, A, V, keep = made(n, d, rank, dtype, masked)
    mask = keep if masked else None
    kept = x.double() * keep
    sums = ROUNDING[A.dtype]

    U = low_rank.project(x, A, mask)
    assert (U.shape, U.dtype, U.is_contiguous()) == ((n, rank), A.dtype, True)
    assert ((U - kept @ A.double().T).abs() <= d * sums * (kept.abs() @ A.double().abs().T)).all()

    D = low_rank.gather(V, x, mask)
    assert (D.shape, D.dtype) == ((rank, d), A.dtype)
    assert ((D - V.double().T @ kept).abs() <= (n + 1) * sums * (V.double().abs().T @ kept.abs())).all()

    y = x.clone()
    low_rank.add_expanded(y, V, A, mask, scale=1.5)
    exact = x.double() + 1.5 * (V.double() @ A.double()) * keep
    magnitude = x.double().abs() + 1.5 * (V.double().abs() @ A.double().abs()) * keep
    assert y.dtype == dtype
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # its steps near zero
    once = ROUNDING[dtype] * exact.abs() + (rank + 4) * sums * magnitude + tiny
    assert ((y.double() - exact).abs() <= once).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str, indirect=True)
def test_what_is_dropped_counts_nothing_whatever_it_is(route: str, dtype: torch.dtype) -> None:
    x, A, V, keep = made(20, 40, 4, dtype, masked=True)
    broken = torch.where(keep, x, torch.nan)
    assert torch.equal(low_rank.project(broken, A, keep), low_rank.project(x, A, keep))
    assert torch.equal(low_rank.gather(V, broken, keep), low_rank.gather(V, x, keep))


@pytest.mark.parametrize(
    "x",
    [torch.randn(64, 48).t(), torch.randn(64, 1, dtype=torch.bfloat16).expand(64, 48), torch.empty(0, 48)],
    ids=["transposed", "expanded", "empty"],
)
def test_activations_that_lie_otherwise_are_taken_too(x: Tensor) -> None:
    A = torch.randn(3, x.shape[1])
    keep = torch.rand(x.shape) < 0.5
    torch.testing.assert_close(low_rank.project(x, A, keep), (x.float() * keep) @ A.t())


def test_the_kernels_copy_no_activations() -> None:
    """512 × 2048 in bf16 are 2 MiB; what is cast in pieces takes 1 MiB at a time, and the control copies all."""
    pytest.importorskip("numba")
    x, A, V, keep = made(512, 2048, 4, torch.bfloat16, masked=True)

    def peak(step: object) -> int:
        with Allocations(before=[x, A, V, keep]) as followed:
            assert callable(step)
            step()
        return int(followed.peak)

    assert peak(lambda: (x.float() * keep) @ A.t()) > 4 * 2**20
    assert peak(lambda: low_rank.project(x, A, keep)) < 2**16
    assert peak(lambda: low_rank.add_expanded(x, V, A, keep)) < 2**17
    # eight partial sums of the result's size
    assert peak(lambda: low_rank.gather(V, x, keep)) < 10 * 4 * 2048 * 4


def test_without_numba_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda *_: None)
    x, A, _, keep = made(20, 40, 4, torch.bfloat16, masked=True)
    torch.testing.assert_close(low_rank.project(x, A, keep), (x.float() * keep) @ A.t())
