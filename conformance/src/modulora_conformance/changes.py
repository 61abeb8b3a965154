"""Compares packed weights bit for bit, changes them, and finds changes of global state."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import tile
from modulora_core.spec import PackedWeight, Quantizer

VISIBLE = 1e-3
"""A change of Ŵ counts from this share of its largest magnitude on."""

CANDIDATES = 64
"""How many elements of a tensor are tried."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes, NaN and signed zeros
    too."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_packed(a: PackedWeight, b: PackedWeight) -> bool:
    """Whether two packed weights have the same layout and bytes."""
    same = (same_bits(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    return a.layout == b.layout and all(same)


def check_same_bytes(expected: PackedWeight, found: PackedWeight, origin: str) -> None:
    """Fail if two packed weights differ; ``origin`` says how ``found`` was made."""
    assert found.layout == expected.layout, (
        f"{origin}: expected the layout {expected.layout}, got {found.layout}"
    )
    tensors = expected.tensors.items()
    differing = [name for name, t in tensors if not same_bits(t, found.tensors[name])]
    assert not differing, f"{origin}: expected the same bytes, got others in {', '.join(differing)}"


def clone(packed: PackedWeight, **changed: Tensor) -> PackedWeight:
    """A copy of a packed weight on its own storages, with some tensors changed."""
    copies = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    return packed.layout.fill(copies | changed)


def changed_weight(quantizer: Quantizer, packed: PackedWeight) -> PackedWeight:
    """A copy with another Ŵ: one element of a packed tensor takes the value of its neighbour.

    Such a value is never out of range. Codes are tried first: the smallest integers, and of equal
    integers the largest tensor.
    """

    def rank(name: str) -> tuple[bool, int, int]:
        tensor = packed.tensors[name]
        return tensor.is_floating_point(), tensor.element_size(), -tensor.numel()

    W = tile(quantizer, packed, torch.float64).clone()
    for name in sorted(packed.tensors, key=rank):
        for tensor in _changed(packed.tensors[name]):
            changed = clone(packed, **{name: tensor})
            difference = float((tile(quantizer, changed, torch.float64) - W).abs().max())
            if VISIBLE * float(W.abs().max()) < difference < float("inf"):
                return changed
    pytest.fail(
        "expected Ŵ to change with the packed tensors, got the same values whatever was changed in "
        f"{', '.join(packed.tensors)}: dequantize_tile returns a cached weight",
        pytrace=False,
    )


def _changed(tensor: Tensor) -> Iterator[Tensor]:
    """Copies of ``tensor``, each with one element changed."""
    flat = tensor.reshape(-1)
    differs = (flat[1:] != flat[:-1]).nonzero().flatten()
    for position in differs[:: max(1, len(differs) // CANDIDATES)].tolist():
        copy = flat.clone()
        copy[position] = flat[position + 1]
        yield copy.view(tensor.shape)


def change_in_place(packed: PackedWeight, changed: PackedWeight) -> None:
    """Copy the values of ``changed`` into the storages of ``packed``, as ``load_state_dict``
    does."""
    for name, tensor in packed.tensors.items():
        tensor.copy_(changed.tensors[name])


@contextmanager
def unchanged_globals(action: str) -> Iterator[None]:
    """Fail if the block changes a global random generator (torch, numpy, Python) or a setting.

    It must print nothing either, and make no file in the current folder.
    """
    # draw and set once: what an earlier call has set would show no change
    torch.rand(1)
    random.random()
    np.random.random()
    with kept_settings():
        torch.set_num_threads(UNUSUAL_THREADS)
        gc.enable()
        states, before, printed = _states(), settings(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
                yield
            files = [path.name for path in Path(folder).iterdir()]
        assert not files, f"{action}: expected no file in the current folder, got {files[0]}"
        assert not printed.getvalue(), (
            f"{action}: expected nothing on stdout, where commands print JSON, got "
            f"{printed.getvalue()[:40]!r}; use warnings or logging"
        )
        changed = [name for name, state in _states().items() if state != states[name]]
        assert not changed, (
            f"{action}: expected the global random state of {' and '.join(changed)} unchanged, got "
            "another one; draw from a torch.Generator of your own"
        )
        changed = [name for name, value in settings().items() if value != before[name]]
        assert not changed, (
            f"{action}: expected {' and '.join(changed)} unchanged, got another; it is the "
            "user's: set it in a with block, which sets it back"
        )


@contextmanager
def kept_settings() -> Iterator[None]:
    """Set all settings back at the end of the block."""
    before = settings()
    try:
        yield
    finally:
        for name, value in settings().items():
            if value != before[name]:
                SETTINGS[name][1](before[name])


def settings() -> dict[str, object]:
    """The settings of this process that a library must leave alone, by name."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def _idle_numba_threads() -> int:
    numba = sys.modules.get("numba")
    if numba is None:
        return 0
    try:
        numba.threading_layer()
    except ValueError:  # it has not started its threads, and asking for their number would
        return 0
    return int(numba.config.NUMBA_NUM_THREADS - numba.get_num_threads())


def _leave_numba_threads(idle: int) -> None:
    numba = sys.modules["numba"]
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS - idle)


def _shows_warnings() -> bool:
    with warnings.catch_warnings(record=True) as caught:
        try:
            warnings.warn("the kit asks whether a warning is shown", stacklevel=1)
        except UserWarning:  # the user wants an error
            return True
    return bool(caught)


LIBRARIES = ("KMP_", "LRU_CACHE_", "NUMBA_", "ONEDNN_", "PYTEST_", "TORCH", "TRITON_")
"""Variables that libraries set for themselves, and the core for oneDNN, when they begin."""


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(LIBRARIES)}


def _restore_environment(before: dict[str, str]) -> None:
    for name in _environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


UNUSUAL_THREADS = (os.cpu_count() or 1) + 1
"""No plugin would choose this number, so a plugin that sets one shows."""

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the number of torch's threads": (torch.get_num_threads, torch.set_num_threads),
    "the number of numba's threads": (_idle_numba_threads, _leave_numba_threads),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (
        lambda: torch.get_default_device().type,
        lambda kind: torch.set_default_device(None if kind == "cpu" else kind),
    ),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch's precision of float32 products": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "the processor's treatment of subnormal numbers": (
        lambda: float(torch.tensor(1e-310, dtype=torch.float64) * 1.0) == 0,
        torch.set_flush_denormal,
    ),
    "Python's garbage collection": (
        gc.isenabled,
        lambda on: gc.enable() if on else gc.disable(),
    ),
    "the display of warnings": (
        _shows_warnings,
        lambda shown: warnings.simplefilter("default" if shown else "ignore"),
    ),
    "the environment": (_environment, _restore_environment),
    "numpy's treatment of errors": (np.geterr, lambda found: np.seterr(**found)),
}
"""For each setting, the functions that read and set it."""


def _states() -> dict[str, object]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": random.getstate(),
    }
