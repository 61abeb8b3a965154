"""Checks every quantizer's values on a GPU, and times layers and a model there.

    python examples/benchmarks/gpu.py [-q nf4 optq:bits=3 ...] [--json FILE] [--seconds 440]
    python examples/benchmarks/gpu.py --interpret     # no GPU: Triton's interpreter, values alone

values   packing, tiles and products beside the CPU's: odd shapes, a large one, three dtypes
layers   1, 16, 512 rows beside the dense layer of the same dtype; bitsandbytes too
models   a LoRA step, its peak memory, and greedy decoding, with random weights of LLaMA's shapes;
         dense and bitsandbytes with PEFT

Each method has a process of its own, so that a kernel that breaks the device's context breaks no
other. Several processes check values at once; timed work runs alone. The exit code is 1 if a value
is wrong, and 2 if there is no GPU. Other failures are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from gpu_values import ODD_SHAPES, ROWS, ValuesJob, truths
from llama import SHAPES, RandomWeights
from methods import BASE, Dense, Method, Packed, promised, with_linears
from modulora_conformance.bench.timing import device_name, in_turns
from modulora_conformance.cases import gaussian
from peers import Bitsandbytes
from report import markdown
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from turns import Build, Here, Job, NotMeasuredError, Process
from typing_extensions import override

from modulora_core import QuantLinear
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.models.sites import find_sites
from modulora_core.packed_parameters import PackedParameter

DTYPES = ("bfloat16", "float16", "float32")
FORWARD, BOTH = "forward", "with backward"

WORKERS = 12
"""Processes that check values at once, if there are so many cores."""

BATCH, PROMPT, NEW_TOKENS = (2, 512), 32, 64
"""Segments and tokens of a step; tokens of a prompt and of its answer."""


@dataclass(frozen=True)
class Filled(Packed):
    """A quantizer of ours with random packed weights: times need no real ones."""

    @cached_property
    def _weights(self) -> RandomWeights:
        return RandomWeights(self.quantizer())

    @override
    def layer(self, weight: Tensor, dtype: torch.dtype, *, training: bool = False) -> nn.Module:
        packed = self._weights.packed((weight.shape[0], weight.shape[1])).to(weight.device)
        return QuantLinear(PackedParameter(self._weights.quantizer, packed))


class SpeedJob:
    """Times a method on a device, ``seconds`` for each comparison."""

    def __init__(self, method: Method, device: str, seconds: float) -> None:
        torch.set_float32_matmul_precision("highest")  # some images ask for TF32
        self._method, self._device, self._seconds = method, torch.device(device), seconds

    def layer(self, shape: tuple[int, int], rows: Sequence[int]) -> list[dict[str, Any]]:
        """The time of each product, and its ratio to the dense layer's in the same turns."""
        found, W = [], gaussian(shape, 1).to(self._device)
        for name in DTYPES:
            dtype = getattr(torch, name)
            layers = {"ours": self._method.layer(W, dtype, training=True),
                      BASE: Dense().layer(W, dtype)}  # fmt: skip
            for n in rows:
                x = torch.randn(n, shape[1], device=self._device).to(dtype)
                dY = torch.randn(n, shape[0], device=self._device).to(dtype)
                for passes, work in ((FORWARD, forward), (BOTH, both)):
                    calls = {key: partial(work, layer, x, dY) for key, layer in layers.items()}
                    times = in_turns(calls, seconds=self._seconds, device=self._device)
                    found.append({"passes": passes, "rows": n, "dtype": name,
                                  "ratio": times["ours"].beside(times[BASE]),
                                  "ours": times["ours"].to_json(),
                                  "dense": times[BASE].to_json()})  # fmt: skip
        return found

    def model(self, name: str, batch: tuple[int, int], new_tokens: int) -> dict[str, Any]:
        """The time of a LoRA step with AdamW, its peak memory, and tokens a second.

        Raises:
            NotMeasuredError: the loss is not finite, or an adapter got no gradient.
        """
        torch.manual_seed(0)
        config = SHAPES[name].config()
        with self._device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        targets = sorted({site.module.rpartition(".")[2] for site in find_sites(model).linears})
        model = with_linears(self._method, model, torch.bfloat16)
        model = self._method.adapt(model, targets)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ids = torch.randint(config.vocab_size, batch).to(self._device)

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss: Any = self._method.loss(model, ids)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        loss = step()
        without = sum(parameter.grad is None for parameter in trained)
        if not torch.tensor(loss).isfinite() or without:
            raise NotMeasuredError(f"loss {loss:g}, {without} parameters without a gradient")
        with PeakMemory(self._device) as peak:
            step()
        timing = in_turns({"step": step}, seconds=10 * self._seconds, device=self._device, least=2)
        rate = self._decoding_rate(model.eval(), ids[:1, :PROMPT], new_tokens)
        return {"step": timing["step"].to_json(), "peak_memory_bytes": peak.nbytes, "loss": loss,
                "tokens_per_second": rate}  # fmt: skip

    def _decoding_rate(self, model: Any, prompt: Tensor, new_tokens: int) -> float:
        """The best of three runs: Python starts every kernel, so other work only slows it."""
        taken = []
        with torch.inference_mode():
            for _ in range(3):
                started = time.perf_counter()
                self._method.decode(model, prompt, new_tokens).tolist()
                taken.append(time.perf_counter() - started)
        return new_tokens / min(taken)


def forward(layer: nn.Module, x: Tensor, _dY: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def both(layer: nn.Module, x: Tensor, dY: Tensor) -> None:
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(layer(leaf), leaf, dY)


class Run:
    """One run: its flags and its results, by method."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.started = flags, time.perf_counter()
        self.values: dict[str, list[dict[str, Any]]] = {}
        self.layers: dict[str, list[dict[str, Any]]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.not_measured: list[dict[str, str]] = []
        quick = flags.quick or flags.interpret
        self.shapes = ODD_SHAPES[:3] if quick else ODD_SHAPES
        self.large = (128, 128) if quick else (4096, 4096)
        self.rows = ROWS[:3] if flags.interpret else ROWS

    @property
    def wrong(self) -> list[str]:
        """The quantizers with a wrong value, or whose values could not be checked."""
        broken = {each["method"] for each in self.not_measured if each["section"] == "values"}
        failed = {name for name, found in self.values.items()
                  if not all(check["passed"] for check in found)}  # fmt: skip
        return sorted(broken | failed)

    def skip(self, method: str, section: str, why: object) -> None:
        self.not_measured.append({"method": method, "section": section, "reason": str(why)})
        print(f"{method}, {section}: not measured: {why}", file=sys.stderr, flush=True)

    def job(self, build: Build, *arguments: Any) -> Job:
        if self.flags.one_process:
            return Here(build, *arguments)
        return Process(build, *arguments, timeout=self.flags.seconds)

    def check_values(self, words: str, threads: int) -> None:
        flags = self.flags
        try:
            given = truths(words, self.shapes)
            if flags.interpret:
                os.environ["TRITON_INTERPRET"] = "1"  # for the process that starts now
            job = self.job(ValuesJob, words, "cpu" if flags.interpret else flags.device, threads)
            found = job.ask("check", given, self.rows)
            if not flags.interpret:
                found += job.ask("check_large", self.large, self.rows)
            job.end()
        except Exception as error:  # a plugin may raise anything
            self.skip(words, "values", error)
        else:
            self.values[words] = found
        finally:
            if flags.interpret:
                os.environ.pop("TRITON_INTERPRET", None)

    def measure(self, method: Method) -> None:
        """Time a layer and a model."""
        flags, quick = self.flags, self.flags.quick
        if time.perf_counter() - self.started > flags.seconds:
            self.skip(method.name, "layers, models", "no time was left; give more --seconds")
            return
        if (lacking := method.missing()) is not None:
            self.skip(method.name, "layers, models", lacking)
            return
        layer = ("layer", self.large, (1, 16, 512))
        model = ("model", flags.model, (1, 16) if quick else BATCH, 2 if quick else NEW_TOKENS)
        into: dict[str, dict[str, Any]] = {"layer": self.layers, "model": self.models}
        for name, *arguments in (layer, model):
            if isinstance(method, Dense) and name == "layer":
                continue  # each method is measured beside it
            try:
                job = self.job(SpeedJob, method, flags.device, 0.002 if quick else 0.2)
                into[name][method.name] = job.ask(name, *arguments)
                job.end()
            except NotMeasuredError as error:
                self.skip(method.name, f"{name}s", error)

    def to_json(self) -> dict[str, Any]:
        return {
            "device_name": device_name(torch.device(self.flags.device)),
            "interpreted": self.flags.interpret, "torch": torch.__version__,
            "cuda": torch.version.cuda, "hip": torch.version.hip,
            "seconds": time.perf_counter() - self.started, "model": self.flags.model,
            "values": self.values, "layers": self.layers, "models": self.models,
            "not_measured": self.not_measured, "wrong": self.wrong,
        }  # fmt: skip


def values_table(run: Run) -> str:
    """A row for each quantizer, then a line for each check that failed."""
    rows, failures = [], []
    for name, found in run.values.items():
        worst = max(check["error"] / (check["limit"] or 1.0) for check in found)
        passed = sum(check["passed"] for check in found)
        rows.append([name, f"{passed} of {len(found)}", f"{worst:.2g}"])
        for check in found:
            if not check["passed"]:
                text = "{check}, {shape}, {dtype}: error {error:.3g}, limit {limit:.3g} {reason}"
                failures.append(f"{name}: {text.format(**check)}")
    return "\n".join([markdown(["", "passed", "worst error / its limit"], rows), *failures])


def layers_table(run: Run) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    heads = ["", "dtype"]
    for name, found in run.layers.items():
        for each in found:
            head = f"{each['passes']}, {each['rows']}"
            heads += [] if head in heads else [head]
            rows.setdefault((name, each["dtype"]), []).append(f"{each['ratio']:.2f}")
    return markdown(heads, [[*key, *cells] for key, cells in rows.items()])


def models_table(run: Run) -> str:
    """Times, memory and rates, each with its ratio to the dense model's."""

    def figures(found: dict[str, Any]) -> list[float]:
        peak = found["peak_memory_bytes"] / 2**20
        return [1e3 * found["step"]["seconds"], peak, found["tokens_per_second"]]

    rows, base = [], run.models.get(BASE)
    for name, found in run.models.items():
        cells = [name]
        for i, value in enumerate(figures(found)):
            ratio = "" if base is None else f" ({value / max(figures(base)[i], 1e-9):.2f})"
            cells.append(f"{value:.1f}{ratio}")
        rows.append(cells)
    return markdown(["(× dense)", "step ms", "peak MiB", "tokens/s"], rows)


def tables(run: Run) -> Iterator[str]:
    yield f"Values beside the CPU's\n\n{values_table(run)}"
    if run.layers:
        size = "×".join(map(str, run.large))
        yield f"Layers of {size}: times, × dense of that dtype\n\n{layers_table(run)}"
    if run.models:
        yield f"Models of the shapes of LLaMA {run.flags.model}\n\n{models_table(run)}"


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parsed(arguments)
    names = flags.quantizers or promised()
    for words in names:
        if (fault := Packed(words).missing()) is not None:
            return refused(fault)
    if flags.interpret and importlib.util.find_spec("triton") is None:
        return refused("--interpret: expected triton, found none; pip install triton")
    if not flags.interpret and flags.device != "cpu" and not torch.cuda.is_available():
        return refused(
            f"expected a GPU that torch can use, found none (torch {torch.__version__}); "
            "--interpret checks values on the CPU"
        )
    run = Run(flags)
    with_kernel = [w for w in names if "cuda" in Packed(w).quantizer().spec.devices]
    for words in sorted(set(names) - set(with_kernel)):
        run.skip(words, "kernels", "its spec names no cuda: it has no kernel")
    cores = os.cpu_count() or 1
    workers = 1 if flags.interpret or flags.one_process else max(1, min(WORKERS, cores - 1))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(partial(run.check_values, threads=max(1, cores // workers)), with_kernel))
    if not flags.interpret:
        for method in (Dense(), Bitsandbytes(4, bf16=True), *map(Filled, with_kernel)):
            run.measure(method)
    facts = run.to_json()
    print(f"{facts['device_name']}, torch {torch.__version__}, {facts['seconds']:.0f} s")
    for table in tables(run):
        print(f"\n{table}")
    if flags.json is not None:
        flags.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\nwrong values: {', '.join(run.wrong) or 'none'}")
    return 1 if run.wrong or not run.values else 0


def refused(fault: str) -> int:
    print(f"error: {fault}", file=sys.stderr)
    return 2


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("-q", "--quantizers", nargs="+", metavar="NAME[:OPTION=VALUE,...]",
        help="by default all installed ones, as they promise")  # fmt: skip
    add("--seconds", type=float, default=440.0, help="nothing new begins after these (440)")
    add("--model", choices=tuple(SHAPES), help="the shapes (1b)")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--interpret", action="store_true", help="check values in Triton's interpreter")
    add("--device", default="cuda", help="cuda or cuda:1; cpu tries this script")
    add("--quick", action="store_true", help="a short trial")
    add("--one-process", action="store_true", help="for a debugger")
    flags = parser.parse_args(arguments)
    flags.model = flags.model or ("tiny" if flags.quick else "1b")
    if flags.interpret:
        flags.device = "cpu"
    return flags


if __name__ == "__main__":
    sys.exit(main())
