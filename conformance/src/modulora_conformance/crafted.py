"""Makes packed weights as an attacker would craft them, and reads them in another process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import accepts, generator, other_options
from modulora_conformance.elsewhere import Request, elsewhere, request, results
from modulora_core.spec import PackedWeight, Quantizer

Outcome = dict[str, Tensor] | str
"""Tiles and products by name, or the error that refused them."""

OTHER_BYTES, TOO_FEW, TOO_MANY = "other bytes", "too few tensors", "too many tensors"


ALL_BITS = "all bits set"


def crafted(quantizer: Quantizer, weight: PackedWeight) -> Iterator[tuple[str, str, PackedWeight]]:
    """Kind, title and weight. Floats of the kind ``OTHER_BYTES`` keep their values."""
    yield OTHER_BYTES, ALL_BITS, _filled(weight, lowest=255)
    for seed in range(3):
        yield OTHER_BYTES, f"random bytes of seed {seed}", _filled(weight, seed=seed)
    for name, tensor in weight.tensors.items():
        short = tensor.flatten()[:1].view([1] * tensor.dim())
        yield TOO_FEW, f"{name} of one element", _with(weight, {name: short})
        if len(weight.tensors) > 1:
            yield TOO_FEW, f"without {name}", _with(weight, {name: None})
    for name in sorted(_names_elsewhere(quantizer, weight)):
        more = _with(weight, {name: torch.ones(1)})
        yield TOO_MANY, f"with a tensor {name} of one element", more


def outcomes(quantizer: Quantizer, weights: Mapping[str, PackedWeight]) -> dict[str, Outcome]:
    """Read each weight in another process. Fails and names a weight that ends it.

    A protected page follows each packed tensor. Numba checks every index too if the variable
    NUMBA_BOUNDSCHECK is 1; then its cache must be another folder (NUMBA_CACHE_DIR).
    """
    asked = {title: request(quantizer, weight, torch.float32) for title, weight in weights.items()}
    try:
        return dict(zip(asked, elsewhere(_outcomes, [*asked.values()]), strict=True))
    except pytest.fail.Exception:
        for title, one in asked.items():
            try:
                elsewhere(_outcomes, [one])
            except pytest.fail.Exception as failure:
                pytest.fail(f"{title}: {failure.msg}", pytrace=False)
        raise


def _outcomes(requests: Sequence[Request]) -> list[Outcome]:
    found: list[Outcome] = []
    for asked in requests:
        try:
            found += results([asked], guard=sys.platform == "linux")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def _filled(weight: PackedWeight, *, lowest: int = 0, seed: int = 0) -> PackedWeight:
    """The same weight with integers of random bytes, from ``lowest`` on."""
    draw, others = generator(seed), dict[str, Tensor | None]()
    for name, tensor in weight.tensors.items():
        if not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.numel():
            drawn = torch.randint(lowest, 256, (tensor.nbytes,), generator=draw, dtype=torch.uint8)
            others[name] = drawn.view(tensor.dtype).view(tensor.shape)
    return _with(weight, others)


def _with(weight: PackedWeight, others: Mapping[str, Tensor | None]) -> PackedWeight:
    """The same weight with some tensors replaced or, for None, removed."""
    tensors = {**weight.tensors, **others}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return PackedWeight(weight.quantizer, weight.format, weight.shape, kept, weight.metadata)


def _names_elsewhere(quantizer: Quantizer, weight: PackedWeight) -> set[str]:
    """Names of tensors that only other options give, and a name that no options give."""
    cls, names = type(quantizer), {"surplus"}
    for options in other_options(quantizer):
        other = cls(cls.Options.model_validate(options))
        if accepts(other, weight.shape):
            names |= set(other.layout(weight.shape).tensors)
    return names - set(weight.tensors)
