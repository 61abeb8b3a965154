"""Pack a matrix, or all matrices of one parameter: an error of the plugin says what it packed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from modulora_core.checkpoints.record import PackedSite
from modulora_core.errors import WorkError, note_plugin
from modulora_core.spec import Calibration, PackedWeight, Quantizer


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

    Raises WorkError: the quantizer broke the promise of its layout.
    """
    packed: list[PackedWeight] = []
    with random_stream(seed, name), torch.no_grad():
        for matrix, calibration in zip(matrices, calibrations, strict=True):
            packed.append(pack_matrix(name, quantizer, matrix, calibration))
            if packed[-1].layout != site.layout:
                raise WorkError(
                    f"{name}: layout() and pack() of {packed[-1].quantizer} disagree: "
                    f"{site.layout.differences(packed[-1].layout)}; tell the plugin's author"
                )
    return packed


def pack_matrix(
    name: str, quantizer: Quantizer, matrix: Tensor, calibration: Calibration | None
) -> PackedWeight:
    """Pack a matrix, ``[out, in]``. An exception of the plugin gets a note that names it."""
    try:
        return quantizer.pack(matrix, calibration)
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        note_plugin(error, quantizer.spec.name, f"packing {name}, {list(matrix.shape)}")
        raise
