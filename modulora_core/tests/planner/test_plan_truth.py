"""The plan beside real runs, each in a process of its own on one thread: 8 % of the resident set at its peak, and of torch's tensors.

If the peaks differ and the work doesn't: a library takes more or less than overhead.py says; docs/planning.md has the command that
measures it again. If the work of a training step differs: see test_plan_families.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modulora_core.planner import jobs
from modulora_core.planner.fitting import plan_memory
from modulora_core.planner.jobs import Job
from modulora_core.planner.overhead import TRITON_BYTES
from modulora_core.planner.rehearsal import rehearse_training
from modulora_core.planner.request import PlanRequest, finetuning
from modulora_core.planner.subject import Subject, open_subject
from modulora_core.registry import Choice, entries
from modulora_core.tests import planned_run
from modulora_core.tests.tiny_tokenizer import make_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak"),
]

WITHIN = 0.08

PEAK_WITHIN = WITHIN if torch.version.cuda is None else 0.15
"""Libraries of torch's build for CUDA took 450 MiB of a process in one run of these tests, 616 in another (overhead.CUDA_BUILD_BYTES)."""

TRIES = 4

WORK: Mapping[str, tuple[str, ...]] = {
    "training": ("gradients", "activations", "workspace", "loss"),
    "decoding": ("activations", "workspace", "loss", "kv_cache"),
    "quantizing": ("dense_weights", "activations", "workspace", "calibration"),
}
"""The items that torch's operations allocate while the job is done."""

KEPT = {"gradient_checkpointing": False}

TRAINING: list[tuple[int, dict[str, Any]]] = [
    (0, {"batch_size": 1, "seq_len": 512}),
    (0, {"batch_size": 1, "seq_len": 256, **KEPT, "mapped": True}),
    (0, {"batch_size": 2, "seq_len": 256, **KEPT, "dropout": 0.0}),
    (0, {"batch_size": 1, "seq_len": 512, **KEPT, "dtype": "bfloat16"}),
    (1, {"batch_size": 2, "seq_len": 256, **KEPT, "rank": 64}),
    (
        1,
        {
            "batch_size": 1,
            "seq_len": 512,
            "rank": 128,
            "dtype": "bfloat16",
            "keep_products": "rounded",
        },
    ),
    (1, {"batch_size": 4, "seq_len": 64, **KEPT, "targets": "q_proj,v_proj"}),
    (2, {"batch_size": 1, "seq_len": 512, **KEPT}),
    (2, {"batch_size": 2, "seq_len": 256, "keep_products": "exact"}),
    (2, {"batch_size": 3, "seq_len": 128, **KEPT, "train_scales": True}),
    (3, {"batch_size": 1, "seq_len": 512, **KEPT, "rank": 4}),
    (3, {"batch_size": 2, "seq_len": 256, "offload_activations": True}),
]
"""A quantizer's number among those that need no calibration first, and the options of the run."""

DECODING: list[tuple[int, dict[str, Any]]] = [
    (1, {"prompt": 1900}),
    (2, {"prompt": 1000, "mapped": True}),
]

CALIBRATION = (4, 256)
"""Samples, and tokens in each."""

PACKED_HEAD = 1
"""The number of the quantizer beside which number 0 packs the output head."""

Taken = Mapping[str, int]
Quantized = Callable[[int], tuple[Path, Path, dict[str, Any], Taken]]


@cache
def usable() -> list[str]:
    """The installed quantizers, those that pack fast first; of a process like those that run, where no test's quantizer is known."""
    words = [sys.executable, "-m", "modulora_core.cli", "list-quantizers", "--json"]
    listed = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)[
        "quantizers"
    ]
    installed = {quantizer["name"] for quantizer in listed if quantizer["status"] == "ok"}
    specs = [
        entry.spec for entry in entries() if entry.spec is not None and entry.name in installed
    ]
    return [
        spec.name
        for spec in sorted(specs, key=lambda spec: (spec.calibration != "none", spec.name))
    ]


def run(job: str, options: Mapping[str, Any]) -> Taken:
    """What the job really takes where its kernels were compiled before.

    Compiled code can be lost where another process of the suite writes to the same index at the same time, and is then made again.
    """
    for attempt in range(TRIES):
        out = {"out": f"{options['out']}-{attempt}"} if attempt and "out" in options else {}
        taken = _run(job, {**options, **out})
        if not taken["compiled"]:
            return taken
    raise AssertionError(f"kernels were compiled in each of {TRIES} runs of {job} {options}")


def _run(job: str, options: Mapping[str, Any]) -> Taken:
    words = [sys.executable, str(planned_run.__file__), job, json.dumps(options)]
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=1200, env=os.environ | one_thread
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """``quantized(number)``: a Llama of 12 million weights, packed by the quantizer of that number; how, and what it took."""
    root = tmp_path_factory.mktemp("planned")
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
             "vocab_size": 8192, "max_position_embeddings": 2048}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(root / "dense")
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
        out = root / f"packed-{number}"
        return (
            root / "dense",
            out,
            how,
            run("quantizing", {"model": str(root / "dense"), "out": str(out), **how}),
        )

    return pack


def held_to_the_truth(name: str, plan: Job, real: Taken) -> None:
    work = sum(plan.items.get(item, 0) for item in WORK[name])
    told = f"peak {plan.nbytes / real['peak']:.3f} of the real one, work {work / real['work']:.3f}: {dict(plan.items)}, {real}"
    print(told)
    assert work == pytest.approx(real["work"], rel=WITHIN), told
    assert plan.nbytes == pytest.approx(real["peak"], rel=PEAK_WITHIN), told


def packed_subject(model: Path) -> Subject:
    subject = open_subject(str(model))
    assert isinstance(subject, Subject)
    return subject


@pytest.mark.parametrize(
    ("number", "options"),
    TRAINING,
    ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in TRAINING],
)
def test_a_training_plan_is_within_8_percent_of_a_real_run(
    number: int, options: dict[str, Any], quantized: Quantized, tmp_path: Path
) -> None:
    _, model, *_ = quantized(number)
    asked = PlanRequest(str(model), config=finetuning({"grad_accum": 1, "steps": 2, **options}))
    subject = packed_subject(model)
    plan = jobs.training(subject, asked, rehearse_training(subject, asked))
    held_to_the_truth("training", plan, run("training", {"model": str(model), "out": str(tmp_path / "out"), **options}))  # fmt: skip


@pytest.mark.parametrize("number", range(4))
def test_a_quantizing_plan_is_within_8_percent_of_a_real_run(
    number: int, quantized: Quantized
) -> None:
    dense, _, how, real = quantized(number)
    samples, seq_len = how.get("calibration", (1, 1))
    head = Choice.parse(how["head"]) if "head" in how else None
    asked = PlanRequest(
        str(dense), how["quantizer"], config=finetuning({"seq_len": 64}), calibration_samples=samples, calibration_seq_len=seq_len,
        head=head,
    )  # fmt: skip
    plan = plan_memory(asked).quantizing
    assert plan is not None
    held_to_the_truth("quantizing", plan, real)


@pytest.mark.parametrize(("number", "options"), DECODING, ids=["packed-head", "mapped"])
def test_a_decoding_plan_is_within_8_percent_of_a_real_run(
    number: int, options: dict[str, Any], quantized: Quantized
) -> None:
    _, model, *_ = quantized(number)
    real = run("decoding", {"model": str(model), **options})
    config = finetuning({"seq_len": real["prompt"], "mapped": options.get("mapped", False)})
    held_to_the_truth("decoding", jobs.decoding(packed_subject(model), PlanRequest(str(model), config=config)), real)  # fmt: skip


@pytest.mark.skipif(
    find_spec("triton") is None, reason="it is about Triton, where that is installed"
)
def test_triton_takes_what_is_planned_for_it() -> None:
    imports = "with PeakMemory() as peak: from transformers import PreTrainedModel"
    code = f"from modulora_core.devices.memory import PeakMemory\n{imports}\nprint(peak.nbytes)"
    without = f"import sys; sys.modules['triton'] = None\n{code}"  # as if it weren't installed
    taken, less = (
        int(
            subprocess.run(
                [sys.executable, "-c", words], capture_output=True, text=True, check=True
            ).stdout
        )
        for words in (code, without)
    )
    assert taken - less == pytest.approx(TRITON_BYTES, rel=0.15)
