"""vLLM in a process of its own: ``python in_vllm.py FOLDER ANSWERS.json``.

The file has a list of :class:`Answer` as JSON. vLLM comes with modulora-vllm, which the kit doesn't
import.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROMPTS = ([3, 5, 7, 9, 11, 13, 2], [17], [4] * 20, list(range(20, 33)))
"""Token ids of unequal lengths, which vLLM puts into one batch."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


class Answer(NamedTuple):
    """A prompt and what vLLM wrote.

    Attributes:
        ids: of the prompt and the new tokens.
        log_probabilities: of all but the first.
    """

    ids: list[int]
    log_probabilities: list[float]


def has_vllm() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("vllm", "modulora_vllm"))


def vllm_answers(folder: Path) -> list[Answer]:
    """Let vLLM load a folder and answer :data:`PROMPTS` in fp32.

    Raises:
        AssertionError: it failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "answers.json"
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, __file__, str(folder), str(target)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        said = done.stdout[-2000:] + done.stderr[-4000:]
        assert done.returncode == 0, f"vLLM: expected answers, got code {done.returncode}: {said}"
        return [Answer(*each) for each in json.loads(target.read_text())]


def _answer(folder: str) -> list[Answer]:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
              max_model_len=64, max_num_seqs=8, disable_log_stats=True)  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=1, detokenize=False,
        ignore_eos=True,
    )  # fmt: skip
    found = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling)
    answers = []
    for prompt, each in zip(PROMPTS, found, strict=True):
        (output,) = each.outputs
        ids = [*prompt, *output.token_ids]
        tables = [*each.prompt_logprobs[1:], *output.logprobs]  # the first token has none
        log_probabilities = [t[i].logprob for i, t in zip(ids[1:], tables, strict=True)]
        answers.append(Answer(ids, log_probabilities))
    return answers


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_answer(sys.argv[1])))
