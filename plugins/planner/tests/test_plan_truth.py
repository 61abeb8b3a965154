"""Plans beside real runs, each in a process of its own on one thread.

A plan is within 8 % of the resident set at its peak, and of torch's tensors. If only the peaks
differ, a library takes more or less than memory.RUNTIME says. If the work of a training step
differs, see test_rehearsal.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from modulora_planner.fitting import plan
from modulora_planner.memory import Job
from transformers import AutoModelForCausalLM, LlamaConfig

from modulora_core.registry import Choice, entries
from modulora_core.tests.tiny_tokenizer import make_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak"),
]

WITHIN = 0.08
PEAK_WITHIN = WITHIN if torch.version.cuda is None else 0.15
"""Libraries of torch's build for CUDA took 450 MiB in one run of these tests, 616 in another."""

TRIES = 4

RUN = Path(__file__).with_name("planned_run.py")

WORK: Mapping[str, tuple[str, ...]] = {
    "training": ("gradients", "activations", "workspace", "loss"),
    "decoding": ("activations", "workspace", "loss", "kv_cache"),
    "quantizing": (
        "dense_weights",
        "activations",
        "workspace",
        "calibration",
        "embeddings_and_head",
        "loss",
    ),
}
"""The items that torch's operations allocate during a job."""

KEPT = {"gradient_checkpointing": False}

TRAINING: list[tuple[int, dict[str, Any]]] = [
    (0, {"batch_size": 1, "seq_len": 512}),
    (1, {"batch_size": 2, "seq_len": 256, **KEPT, "dtype": "bfloat16", "rank": 64}),
    (2, {"batch_size": 2, "seq_len": 256, "keep_products": True, "mapped": True}),
    (3, {"batch_size": 3, "seq_len": 128, **KEPT, "train_scales": True}),
]
"""A quantizer's number, those without calibration first, and the options of the run."""

CALIBRATION = (4, 256)
"""Samples, and tokens of each."""

PACKED_HEAD = 1
"""The quantizer's number with which number 0 packs the output head."""

Taken = Mapping[str, int]
Quantized = Callable[[int], tuple[Path, Path, dict[str, Any], Taken]]


@cache
def usable() -> list[str]:
    """The installed quantizers but for the tests' own: without calibration, with it, optional."""
    found = [entry for entry in entries() if entry.status == "ok" and entry.spec is not None]
    specs = [entry.spec for entry in found if "toy" not in entry.distribution]
    order = ("none", "required", "optional")
    return [s.name for s in sorted(specs, key=lambda s: (order.index(s.calibration), s.name))]


def run(job: str, options: Mapping[str, Any]) -> Taken:
    """Run a job until it compiles no kernel.

    Processes of the suite that write to one index at the same time can lose compiled code.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    for attempt in range(TRIES):
        out = {"out": f"{options['out']}-{attempt}"} if attempt and "out" in options else {}
        words = [sys.executable, str(RUN), job, json.dumps({**options, **out})]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=1200, env=os.environ | one_thread
        )
        assert done.returncode == 0, done.stderr
        taken: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
        if not taken["compiled"]:
            return taken
    raise AssertionError(f"kernels were compiled in each of {TRIES} runs of {job} {options}")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """``quantized(number)`` packs a Llama of 12 million weights, and measures that."""
    root = tmp_path_factory.mktemp("planned")
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=8192, max_position_embeddings=2048, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    needs = {entry.name: entry.spec.calibration for entry in entries() if entry.spec is not None}

    @cache
    def pack(number: int) -> tuple[Path, Path, dict[str, Any], Taken]:
        name = usable()[number % len(usable())]
        how: dict[str, Any] = {"quantizer": name}
        if needs[name] == "required":
            how["calibration"] = CALIBRATION
        if number == PACKED_HEAD:
            how["head"] = usable()[0]
        model, out = str(root / "dense"), root / f"packed-{number}"
        taken = run("quantizing", {"model": model, "out": str(out), **how})
        # the last attempt is the whole one
        written = sorted(root.glob(f"packed-{number}*"), key=lambda path: path.stat().st_mtime)
        return root / "dense", written[-1], how, taken

    return pack


def check(name: str, planned: Job, real: Taken) -> None:
    work = sum(planned.items.get(item, 0) for item in WORK[name])
    ratios = f"peak {planned.nbytes / real['peak']:.3f}, work {work / real['work']:.3f} of the real"
    print(ratios, dict(planned.items), real)
    assert work == pytest.approx(real["work"], rel=WITHIN), ratios
    assert planned.nbytes == pytest.approx(real["peak"], rel=PEAK_WITHIN), ratios


@pytest.mark.parametrize(("number", "options"), TRAINING)
def test_a_training_plan_is_within_8_percent_of_a_real_run(
    number: int, options: dict[str, Any], quantized: Quantized, tmp_path: Path
) -> None:
    _, model, *_ = quantized(number)
    real = run("training", {"model": str(model), "out": str(tmp_path / "out"), **options})
    planned = plan(str(model), **{"grad_accum": 1, "steps": 2, **options})
    check("training", planned.training, real)


@pytest.mark.parametrize("number", [PACKED_HEAD, 2], ids=["packed-head", "calibrated"])
def test_a_quantizing_plan_is_within_8_percent_of_a_real_run(
    number: int, quantized: Quantized
) -> None:
    dense, _, how, real = quantized(number)
    samples, seq_len = how.get("calibration", (1, 1))
    planned = plan(
        str(dense), how["quantizer"], head=Choice(how["head"]) if "head" in how else None,
        calibration_samples=samples, calibration_seq_len=seq_len, seq_len=64,
    )  # fmt: skip
    assert planned.quantizing is not None
    check("quantizing", planned.quantizing, real)


def test_a_decoding_plan_is_within_8_percent_of_a_real_run(quantized: Quantized) -> None:
    _, model, *_ = quantized(PACKED_HEAD)
    real = run("decoding", {"model": str(model), "prompt": 1900})
    check("decoding", plan(str(model), seq_len=real["prompt"]).decoding, real)
