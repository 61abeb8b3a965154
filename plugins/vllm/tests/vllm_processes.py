"""vLLM in a process of its own, and transformers' values to compare its answers with."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

PROMPTS = [[3, 5, 7, 9, 11, 13, 2], [17], [4] * 20, list(range(20, 33)), [90, 1, 60], [8, 9]]
"""Prompts of unequal lengths, which vLLM puts into one batch."""


def need_vllm():
    """Skip a module's tests where vLLM isn't installed."""
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM isn't installed; make test-vllm runs these tests"
        pytest.skip(reason, allow_module_level=True)


def run_vllm(folder, *requests, new=6, site=None, processes=False):
    """vLLM's answer to each request (:mod:`in_vllm`), or its error in one line.

    Args:
        site: a folder of packages for vLLM too.
        processes: let vLLM start processes of its own, as a server does.
    """
    source, target = folder / "requests.json", folder / "answers.json"
    whole = [{"prompts": PROMPTS, "new": new, **request} for request in requests]
    source.write_text(json.dumps(whole, default=str))
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": str(site or ""),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each worker wants a NUMA node of its own
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / "in_vllm.py"), str(source), str(target)],
        env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    print(done.stdout, done.stderr[-8000:])  # pytest shows it if the test fails
    return json.loads(target.read_text())


def log_probabilities(model, ids):
    """Of each id but the first, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def largest_difference(answers, model, prompts=PROMPTS):
    """Between vLLM's log-probabilities and transformers', over prompts and new tokens."""
    assert not isinstance(answers, str), answers
    worst = 0.0
    for ids, answer in zip(prompts, answers, strict=True):
        expected = log_probabilities(model, [*ids, *answer["ids"]])
        found = torch.tensor([*answer["prompt"], *answer["logprobs"]])
        worst = max(worst, float((expected[-len(found) :] - found).abs().max()))
        assert len(answer["ids"]) > 0
    return worst
