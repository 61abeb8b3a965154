"""Packs, reads and multiplies in another process.

On Linux a server process imports torch and numba once, and forks a child for each job
(multiprocessing's ``forkserver``). A child knows no plugin, no kernel, and nothing of the process
that asks.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from modulora_conformance.cases import both_ways, fit, gaussian, pack, packed, tile
from modulora_conformance.changes import settings
from modulora_conformance.covered import recording
from modulora_conformance.memo import once
from modulora_conformance.pages import Place, guarded
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.dense_products import one_thread
from modulora_core.packed import PackedLayout
from modulora_core.registry import create
from modulora_core.spec import PackedWeight, Quantizer

TIMEOUT = 600
"""Seconds: importing torch and compiling kernels, on a busy machine."""

SIDE = 4096
"""A square weight of 64 MiB in fp32, much more than anything else that packing takes."""

_NEW: Any = multiprocessing.get_context("spawn")
_FORKED: Any = multiprocessing.get_context("forkserver") if sys.platform == "linux" else _NEW


def elsewhere(job: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """``job(*arguments)`` in another process, with more environment variables. Fails if it fails.

    ``job`` is a function of a module. Its arguments and its result are pickled.
    """
    numbas = any(name.startswith("NUMBA_") for name in environment)  # it reads them once
    context = _NEW if numbas else _FORKED
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, {**os.environ, **environment}))
    start_server()
    with _other_hashes():
        process.start()
    theirs.close()
    try:
        ours.send_bytes(_dumped((job, arguments, recording.files_recorded())))
        if not ours.poll(TIMEOUT):
            process.kill()
        result, error, recorded = pickle.loads(ours.recv_bytes())
        recording.add(recorded)
    except (EOFError, OSError):
        process.join()
        result, error = None, f"an end with exit code {process.exitcode}"
    process.join()
    if error is not None:
        pytest.fail(f"expected another process to do the same work, got {error}", pytrace=False)
    return result


def start_server() -> None:
    """Let the server import all while this process works. The first job then waits less."""
    if sys.platform == "linux":
        from multiprocessing import forkserver

        preloaded = ["torch", "modulora_core.registry", __name__, "modulora_conformance.preloaded"]
        forkserver.set_forkserver_preload(preloaded)
        with _other_hashes():
            forkserver.ensure_running()


@contextmanager
def _other_hashes() -> Iterator[None]:
    """In a process that the block starts, strings hash differently."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1")
        yield


def _work(pipe: Any, variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    job, arguments, files = pickle.loads(pipe.recv_bytes())
    result, failure = None, None
    recorder = recording.coverage_of(files) if files else None
    try:
        with recording.recording(recorder):
            result = job(*arguments)
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
    recorded = recorder.get_data().dumps() if recorder is not None else b""
    pipe.send_bytes(_dumped((result, failure, recorded)))


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() == 1:
            return _viewed, (value.view(torch.uint8), value.dtype)  # torch can't: a float of 8 bits
        return NotImplemented


def _viewed(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.view(dtype)


def _dumped(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class Request(NamedTuple):
    """A packed weight for another process, in the parts that a checkpoint has.

    Attributes:
        name: the quantizer's.
        options: as a checkpoint records them.
        layout: as a checkpoint records it.
        tensors: the packed tensors.
        inputs: ``x.NAME: [n, in]`` and ``dY.NAME: [n, out]``. Tiles are read in their dtypes.
    """

    name: str
    options: Mapping[str, Any]
    layout: Mapping[str, Any]
    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]


def request(
    quantizer: Quantizer, weight: PackedWeight, *dtypes: torch.dtype, rows: int = 3
) -> Request:
    """A request with ``rows`` rows of inputs for both products in each dtype."""
    inputs = {
        f"{'dY' if transpose else 'x'}.{name_of(dtype)}": x
        for dtype in dtypes
        for transpose, x in both_ways(weight, rows, dtype=dtype, seed=1)
    }
    options = quantizer.options.model_dump(mode="json")
    layout = json.loads(json.dumps(weight.layout.to_json()))
    return Request(quantizer.spec.name, options, layout, dict(weight.tensors), inputs)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results(requests: Sequence[Request], guard: bool = False) -> list[dict[str, Tensor]]:
    """Read and multiply each packed weight. A job for :func:`elsewhere`.

    Args:
        requests: the packed weights.
        guard: whether nothing readable follows the last byte of a packed tensor. A part of the
            rows is read too, which ends elsewhere in a byte.

    Returns:
        for each request, ``tile.DTYPE`` with all rows of Ŵ, and ``product.NAME`` and
        ``transposed.NAME`` for the inputs. ``guard`` adds ``part.DTYPE``, without the first third
        of the rows.
    """
    with one_thread():
        return [_results(request, guard) for request in requests]


def first_results(request: Request) -> list[dict[str, Tensor]]:
    """The results of two threads that read a packed weight at once, before any other use.

    A job for :func:`elsewhere`.
    """
    quantizer, weight = _opened(request, guard=False)
    both = threading.Barrier(2)

    def read(_: int) -> dict[str, Tensor]:
        both.wait()
        return _read(quantizer, weight, request, guard=False)

    sys.setswitchinterval(1e-5)
    with one_thread(), ThreadPoolExecutor(2) as pool:
        return list(pool.map(read, range(2)))


def _results(request: Request, guard: bool) -> dict[str, Tensor]:
    return _read(*_opened(request, guard), request, guard)


def _opened(request: Request, guard: bool) -> tuple[Quantizer, PackedWeight]:
    quantizer, layout = (
        create(request.name, request.options),
        PackedLayout.from_json(request.layout),
    )
    quantizer.check_format(layout)
    tensors = request.tensors
    return quantizer, layout.fill({n: guarded(t) for n, t in tensors.items()} if guard else tensors)


def _read(
    quantizer: Quantizer, weight: PackedWeight, request: Request, guard: bool
) -> dict[str, Tensor]:
    found = {}
    for dtype in {x.dtype for x in request.inputs.values()}:
        found[f"tile.{name_of(dtype)}"] = tile(quantizer, weight, dtype)
        if guard:
            found[f"part.{name_of(dtype)}"] = tile(quantizer, weight, dtype, weight.shape[0] // 3)
    for name, x in request.inputs.items():
        operand, _, of = name.partition(".")
        product = "transposed" if operand == "dY" else "product"
        found[f"{product}.{of}"] = quantizer.matmul(x, weight, operand == "dY")
    return found


class Answer(NamedTuple):
    """Ŵ in fp32 as another process reads it, and the same dense weight as it packs it."""

    tile: Tensor
    packed: PackedWeight
    changed: Sequence[str]
    """Settings of the process that importing and using the quantizer changed."""


def answered(
    quantizer: Quantizer, shape: tuple[int, int], before: Sequence[Mapping[str, Any]]
) -> Answer:
    """Another process's answer about :func:`modulora_conformance.cases.packed`. Cached.

    The process uses the options in ``before`` first.
    """
    return _answered(quantizer, shape, json.dumps(list(before)))


@once(most=8)
def _answered(quantizer: Quantizer, shape: tuple[int, int], before: str) -> Answer:
    here = packed(quantizer, shape)
    asked = request(quantizer, here, torch.float32)
    tile, layout, tensors, changed = elsewhere(
        _answer, asked, gaussian(here.shape, 0), json.loads(before)
    )
    return Answer(tile, PackedLayout.from_json(layout).fill(tensors), changed)


def _answer(request: Request, dense: Tensor, before: Sequence[Mapping[str, Any]]) -> Any:
    at_first = settings()
    for options in before:
        with suppress(Exception):  # a run with these options reports failures
            quantizer = create(request.name, options)
            weight = pack(quantizer, gaussian(fit(quantizer, *dense.shape), 1))
            tile(quantizer, weight)
            quantizer.matmul(torch.ones(1, weight.shape[1]), weight)
    (found,) = results([request])
    there = pack(create(request.name, request.options), dense)
    changed = [name for name, value in settings().items() if value != at_first[name]]
    return found["tile.float32"], there.layout.to_json(), dict(there.tensors), changed


def read_protected(requests: Sequence[Request], place: Place | None) -> None:
    """Read and multiply tensors in protected memory: an end of this process is the finding.

    Args:
        requests: packed weights and their inputs.
        place: the end of each tensor that touches a protected page; None lets packed tensors be
            read and not written, and x be written.
    """
    for asked in requests:
        _read_protected(asked, place)


def _read_protected(asked: Request, place: Place | None) -> None:
    quantizer, layout = create(asked.name, asked.options), PackedLayout.from_json(asked.layout)
    only_read = place is None
    tensors = {
        name: guarded(tensor, place or Place.END, read_only=only_read)
        for name, tensor in asked.tensors.items()
    }
    weight, n = layout.fill(tensors), layout.shape[0]
    with one_thread():
        for name, x in asked.inputs.items():
            for rows in {1, 2, len(x)}:
                operand = guarded(x[:rows], place or Place.END, read_only=only_read)
                quantizer.matmul(operand, weight, name.startswith("dY"))
        for dtype in {x.dtype for x in asked.inputs.values()}:
            for start, stop in ((0, n), (n // 3, n), (0, 1), (n - 1, n)):
                tile(quantizer, weight, dtype, start, stop)
            quantizer.lookup(torch.tensor([n - 1, 0, n // 2]), weight, dtype)


def without_numba_results(requests: Sequence[Request]) -> list[dict[str, Tensor]]:
    """:func:`results`, and the packed tensors of the same weight, where numba is absent."""
    sys.modules["numba"] = None  # type: ignore[assignment]  # importing it raises ImportError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = results(requests)
        for asked, result in zip(requests, found, strict=True):
            quantizer = create(asked.name, asked.options)
            shape = PackedLayout.from_json(asked.layout).shape
            result["own"] = tile(quantizer, pack(quantizer, gaussian(shape, 0)))
    return found


def packing_share(name: str, options: Mapping[str, Any], compiled: bool) -> float:
    """The peak memory of packing a large weight, its own bytes too, in units of the fp32 weight."""
    if not compiled:
        sys.modules["numba"] = None  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    quantizer = create(name, options)
    pack(quantizer, gaussian((512, 512), 0))  # whatever is loaded once is not the weight's
    weight = torch.empty(SIDE, SIDE, dtype=torch.bfloat16).normal_().t()
    with PeakMemory() as peak:
        before = peak.nbytes
        pack(quantizer, weight)
        taken = peak.nbytes - before
    return (taken + weight.nbytes) / (4 * weight.numel())
