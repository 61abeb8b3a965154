"""What the checks pack and multiply: weights of several kinds, calibrations, inputs. All from seeds, on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from modulora_core.errors import ShapeError
from modulora_core.spec import Calibration, PackedWeight, Quantizer

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

SETTINGS = settings(
    max_examples=30,
    deadline=None,  # a kernel is compiled in the first example
    database=None,  # a failure is repeated with the printed seed, not from a hidden folder
    print_blob=True,
    # the quantizer of the fixture holds no state, and the same check runs for many classes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors, HealthCheck.too_slow],
)  # fmt: skip
"""For every check that Hypothesis draws examples for."""

SPREAD = 0.02
"""The standard deviation of weights: that of a language model's."""

seeds = st.integers(0, 2**16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(shape: tuple[int, int], seed: int) -> Tensor:
    return SPREAD * torch.randn(shape, generator=generator(seed))


def heavy_tailed(shape: tuple[int, int], seed: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    chi = torch.randn(3, *shape, generator=generator(seed + 1)).square().mean(0)
    return gaussian(shape, seed) / chi.sqrt()


def outlier_columns(shape: tuple[int, int], seed: int) -> Tensor:
    """Every 64th column is 20 times as large."""
    weight = gaussian(shape, seed)
    weight[:, ::64] *= 20
    return weight


def constant(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.full(shape, SPREAD * (1 + seed % 7) / 4)


KINDS: dict[str, Callable[[tuple[int, int], int], Tensor]] = {
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "outlier_columns": outlier_columns,
    "constant": constant,
}
"""The kinds of :class:`~modulora_core.spec.Promise`."""


def fit(quantizer: Quantizer, out_features: int, in_features: int) -> tuple[int, int]:
    """The next shape from this one on that the quantizer takes."""
    spec = quantizer.spec
    rows, columns = (
        multiple * max(1, math.ceil(size / multiple))
        for size, multiple in ((out_features, spec.out_multiple), (in_features, spec.in_multiple))
    )
    for step in range(32):
        for shape in (
            (rows + step * spec.out_multiple, columns),
            (rows, columns + step * spec.in_multiple),
        ):
            if _takes(quantizer, shape):
                return shape
    return rows, columns  # pack() tells what is wrong with it


def _takes(quantizer: Quantizer, shape: tuple[int, int]) -> bool:
    try:
        quantizer.check_shape(shape)
    except ShapeError:
        return False
    return True


@st.composite
def shapes(
    draw: st.DrawFn, quantizer: Quantizer, rows: int = 40, columns: int = 90
) -> tuple[int, int]:
    """``(out, in)`` that the quantizer takes, odd ones where it does, up to about ``rows`` and ``columns``."""
    return fit(quantizer, draw(st.integers(1, rows)), draw(st.integers(1, columns)))


def identity(in_features: int) -> Calibration:
    """Every input counts the same."""
    return Calibration(torch.eye(in_features), 1)


def correlated(in_features: int, seed: int = 0) -> Calibration:
    """Inputs of which some are large, some depend on others, as in a language model. H is fp32 ``[in, in]``."""
    mix = torch.randn(in_features, in_features, generator=generator(seed)) / math.sqrt(in_features)
    x = torch.randn(4 * in_features, in_features, generator=generator(seed + 1)) @ (
        mix + torch.eye(in_features)
    )
    x *= torch.logspace(-1, 1, in_features)
    H = x.T @ x / len(x)
    return Calibration((H + H.T) / 2, len(x))


def pack(quantizer: Quantizer, weight: Tensor) -> PackedWeight:
    """Pack without calibration data: H is the identity where one is required."""
    required = quantizer.spec.calibration == "required"
    return quantizer.pack(weight, identity(weight.shape[1]) if required else None)


def packed(quantizer: Quantizer, shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    """A packed Gaussian weight of the next shape that the quantizer takes: a copy of what was packed once for these arguments."""
    return copy.deepcopy(_packed(type(quantizer), quantizer.options.model_dump_json(), shape, seed))


@lru_cache(maxsize=32)
def _packed(cls: type[Quantizer], options: str, shape: tuple[int, int], seed: int) -> PackedWeight:
    quantizer = cls(cls.Options.model_validate_json(options))
    return pack(quantizer, gaussian(fit(quantizer, *shape), seed))


def inputs(rows: tuple[int, ...], features: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``[*rows, features]``, normal values."""
    return torch.randn(*rows, features, generator=generator(seed), dtype=torch.float64).to(dtype)
