"""Pack the matrices of one parameter, and describe how parameters are packed before any is read."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from modulora_core.checkpoints.record import PackedSite, distinct_sites
from modulora_core.errors import ShapeError, WorkError, note_plugin
from modulora_core.models.sites import LinearSite
from modulora_core.spec import Calibration, PackedLayout, PackedWeight, Quantizer


def packed_sites(
    linears: Sequence[LinearSite], quantizers: Sequence[Quantizer], chosen: Mapping[str, int]
) -> tuple[tuple[PackedSite, ...], dict[str, int]]:
    """Each kind of packed parameter once, and by name the kind of every parameter.

    Args:
        chosen: by name, the index of a parameter's quantizer.

    Raises:
        ShapeError: a quantizer can't take a layer's shape; the message names the layer.
    """
    layouts: dict[tuple[int, tuple[int, int]], PackedLayout] = {}
    packed = []
    for linear in linears:
        recipe, shape = chosen[linear.name], (linear.out_features, linear.in_features)
        if (recipe, shape) not in layouts:
            layouts[recipe, shape] = _layout_of(quantizers[recipe], shape, linear)
        packed.append((linear, recipe, layouts[recipe, shape]))
    return distinct_sites(packed)


def _layout_of(quantizer: Quantizer, shape: tuple[int, int], linear: LinearSite) -> PackedLayout:
    try:
        quantizer.check_shape(shape)
    except ShapeError as error:
        raise ShapeError(
            f"{error} ({linear.module}); leave it out with --exclude or choose another quantizer"
        ) from None
    return quantizer.layout(shape)


def by_reason(kept: Mapping[str, str]) -> dict[str, list[str]]:
    """Turn name → reason into reason → names, as a record has them."""
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


@contextmanager
def random_stream(seed: int, name: str) -> Iterator[None]:
    """Give a parameter random numbers of its own, so that a resumed run draws the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        yield


def pack_matrices(
    name: str,
    site: PackedSite,
    quantizer: Quantizer,
    matrices: Iterable[Tensor],
    calibrations: Iterable[Calibration | None],
    *,
    seed: int,
) -> list[PackedWeight]:
    """Pack the matrices of a parameter, each ``[out, in]``, on their device.

    Args:
        name: the parameter's name, for its random numbers and for messages.

    Raises:
        WorkError: the quantizer broke the promise of its layout.
    """
    packed: list[PackedWeight] = []
    with random_stream(seed, name), torch.no_grad():
        for matrix, calibration in zip(matrices, calibrations, strict=True):
            try:
                packed.append(quantizer.pack(matrix, calibration))
            except (Exception, SystemExit) as error:  # a plugin may raise anything
                note_plugin(error, quantizer.spec.name, f"packing {name}, {list(matrix.shape)}")
                raise
            if packed[-1].layout != site.layout:
                raise WorkError(
                    f"{name}: {packed[-1].quantizer} packed it as {packed[-1].layout}, but its "
                    f"layout() promised {site.layout}; report it to the plugin's author"
                )
    return packed
