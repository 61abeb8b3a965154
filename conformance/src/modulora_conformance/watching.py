"""Watches each call of a quantizer in all checks: its arguments, the process, what it leaves.

A mistake behind a condition that one check never meets may show in the calls of another. So
findings are collected here, and the checks of level 9 fail by them at the end.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import random
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modulora_conformance.allocations import Allocations
from modulora_conformance.changes import clone, settings
from modulora_conformance.items import key_of
from modulora_core.spec import Calibration, PackedWeight, Quantizer

METHODS = (
    "pack", "dequantize_tile", "matmul", "lookup", "rescaled", "sliced", "snap", "snapped",
)  # fmt: skip

REAL = 2**19
"""A weight of so many elements or more is as large as a layer's of a small language model."""

COPIES, USES = 2, 3
"""A weight that seems to be kept is copied so often, and each copy is used so often."""

MOST = 5
"""Findings of a kind: a report needs no more."""

M_PERTURB, PATTERN = -6, 1
"""glibc's ``mallopt``: memory is filled with bytes 0xFE when it is handed out, and 1 when freed."""


@dataclass
class Findings:
    """What calls of one quantizer did that they must not: sentences, by kind."""

    arguments: list[str] = field(default_factory=list)
    process: list[str] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)


FINDINGS = pytest.StashKey[dict[tuple[str, str], Findings]]()


def findings_of(item: pytest.Item) -> Findings:
    """Those of an item's class and quantizer, in this run."""
    found = item.config.stash.setdefault(FINDINGS, {})
    return found.setdefault(key_of(item), Findings())


@contextmanager
def watching(cls: type[Quantizer], findings: Findings, check: str) -> Iterator[None]:
    """Watch the calls of all instances of ``cls`` in the block, and the process around it.

    Methods that the core defines call these, so they are left as they are.

    Args:
        check: the name that findings begin with.
    """
    watch = _Watch(findings, check)
    before, seen = settings(), _surroundings()
    with pytest.MonkeyPatch.context() as patch, filled_memory():
        for name in METHODS:
            method = getattr(cls, name)
            if method is not getattr(Quantizer, name):
                patch.setattr(cls, name, watch.around(name, method))
        yield
    after, now = settings(), _surroundings()
    changed = [
        _named(name, value, after[name]) for name, value in before.items() if after[name] != value
    ]
    changed += [name for name, value in seen.items() if now[name] != value]
    watch.note(findings.process, *(f"expected {each} unchanged, got another" for each in changed))


@contextmanager
def blaming(findings: Findings) -> Iterator[None]:
    """Let a check that fails in the block say first which argument a call has changed.

    It computed its expected result from the changed argument, so its own message misleads.
    """
    known = len(findings.arguments)
    try:
        yield
    except (AssertionError, pytest.fail.Exception) as error:
        changed = findings.arguments[known:]
        if not changed:
            raise
        called = changed[0].partition(": ")[2]  # without the name of this check
        pytest.fail(f"{called}; then: {error}", pytrace=False)  # reports take the first line


def note_output(item: pytest.Item, printed: str) -> None:
    """Note what a check that passed printed, as pytest has captured it."""
    if printed.strip():
        sentence = f"expected nothing printed, got {printed.strip()[:60]!r}; use logging"
        _Watch(findings_of(item), item.name).note(findings_of(item).process, sentence)


def _named(name: str, before: object, after: object) -> str:
    """A setting's name, with the first variable of an environment that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        return f"{name}'s {min(key for key, _ in before.items() ^ after.items())}"
    return name


@dataclass
class _Watch:
    findings: Findings
    check: str
    _inside: threading.local = field(default_factory=threading.local)

    def note(self, found: list[str], *sentences: str) -> None:
        new = [f"{self.check}: {sentence}" for sentence in sentences]
        found += new[: max(0, MOST - len(found))]

    def around(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, whose outermost calls are watched."""

        @functools.wraps(method)
        def watched(quantizer: Quantizer, *args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "yes", False) or torch.compiler.is_compiling():
                return method(quantizer, *args, **kwargs)
            self._inside.yes = True
            try:
                return self._call(name, method, quantizer, args, kwargs)
            finally:
                self._inside.yes = False

        return watched

    def _call(
        self, name: str, method: Callable[..., Any], quantizer: Quantizer, args: Any, kwargs: Any
    ) -> Any:
        given = _tensors([args, kwargs])
        if not all(_is_plain(tensor) for tensor in given.values()):
            return method(quantizer, *args, **kwargs)
        sums, states = _sums(given), _random_states()
        result, kept = _kept_by(method, quantizer, args, kwargs)
        changed = [key for key, tensor in given.items() if _sum(tensor) != sums[key]]
        called = f"{name} of a {_shape(args)} weight"
        self.note(
            self.findings.arguments,
            *(f"{called}: expected {key} unchanged, got other bytes" for key in changed),
        )
        self.note(self.findings.process, *(
            f"{called}: expected the global random state of {key} unchanged, got another"
            for key, state in _random_states().items() if state != states[key]
        ))  # fmt: skip
        if kept and _keeps_again(method, quantizer, args, kwargs):
            self.note(self.findings.memory, f"{called}: expected nothing kept, got {kept} bytes")
        return result


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in the arguments of a call, by a name for messages."""
    if isinstance(value, Tensor):
        return {name or "x": value}
    if isinstance(value, PackedWeight):
        return {f"the packed tensor {key}": tensor for key, tensor in value.tensors.items()}
    if isinstance(value, Calibration):
        H_O = value.output_hessian
        return {"H": value.hessian} | ({} if H_O is None else {"H_O": H_O})
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return {}
    found = dict[str, Tensor]()
    for i, each in enumerate(value):
        found |= _tensors(each, name and f"argument {i + 1}")
    return found


def _shape(args: Any) -> list[int]:
    weights = [each for each in args if isinstance(each, (PackedWeight, Tensor))]
    packed = [each for each in weights if isinstance(each, PackedWeight)]
    return [int(side) for each in (packed or weights)[:1] for side in each.shape]


def _sums(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {key: _sum(tensor) for key, tensor in tensors.items()}


def _sum(tensor: Tensor) -> int:
    """A checksum of a tensor's storage. It takes no memory, which checks measure."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return 0
    return zlib.adler32((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()))


def _random_states() -> dict[str, int]:
    kind, keys, *place = np.random.get_state(legacy=True)
    return {
        "torch": _sum(torch.default_generator.get_state()),
        "numpy": hash((kind, zlib.adler32(bytes(np.asarray(keys))), *place)),
        "Python": hash(random.getstate()),
    }


def _surroundings() -> dict[str, object]:
    """What a library leaves alone beside its settings: folders and open files."""
    descriptors = Path("/proc/self/fd")
    return {
        "the working folder": Path.cwd(),
        "the files in the working folder": sorted(Path().iterdir()),
        "the folder of temporary files": tempfile.gettempdir(),
        "the number of open files": len(list(descriptors.glob("*"))),
    }


def _kept_by(
    method: Callable[..., Any], quantizer: Quantizer, args: Any, kwargs: Any
) -> tuple[Any, int]:
    """The result of a call, and the bytes that it kept if that is much of a real weight."""
    elements = math.prod(_shape(args))
    if elements < REAL:
        return method(quantizer, *args, **kwargs), 0
    with Allocations(_tensors([args, kwargs]).values()) as allocations:
        result = method(quantizer, *args, **kwargs)
    own = {tensor.untyped_storage().data_ptr(): tensor for tensor in _tensors([result]).values()}
    kept = allocations.alive - sum(each.untyped_storage().nbytes() for each in own.values())
    if kept < elements / 2:  # a quarter of the weight in two bytes
        return result, 0
    gc.collect()
    kept = allocations.alive - sum(each.untyped_storage().nbytes() for each in own.values())
    return result, kept if kept >= elements / 2 else 0


def _keeps_again(method: Callable[..., Any], quantizer: Quantizer, args: Any, kwargs: Any) -> bool:
    """Whether calls with copies keep as much: a table that is made once does not."""
    for _ in range(COPIES):
        copies = [_copy(each) for each in args]
        if any(_kept_by(method, quantizer, copies, kwargs)[1] for _ in range(USES)):
            return True
    return False


def _copy(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return clone(value)
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def filled_memory() -> Iterator[None]:
    """Fill new memory from about a kilobyte on, torch's and numpy's: a float in it is NaN or huge.

    A result that is not written then shows, and no result of an earlier call can stand in for it.
    It needs glibc; elsewhere memory is as the system gives it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        yield
        return
    mallopt(M_PERTURB, PATTERN)
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)
