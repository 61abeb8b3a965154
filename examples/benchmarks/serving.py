"""Tokens a second of vLLM and of transformers' ``generate``, by batch, for several folders.

    python examples/benchmarks/serving.py dense-folder nf4-folder qtip-folder --profile

Needs vLLM (`make test-vllm` builds such an environment). Each folder has a process of its own. In
each turn, every folder answers with both engines at each batch, while the others wait. Prompts have
16 tokens, answers ``--length``, in bf16; the fastest turn counts. ``--profile`` adds which layers
take vLLM's time at the second batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

PROMPT = 16

LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "attn", "logits_processor")
"""The layers of vLLM's Llama that a profile names; none contains another one."""


def seconds(answer: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    answer()
    return time.perf_counter() - begin


def profile(model: Any, answer: Callable[[], Any]) -> str:
    """The share of vLLM's kinds of layers in a turn."""
    spent, begins = Counter[str](), dict[str, float]()
    for name, layer in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in LAYERS:

            def begin(*_: Any, leaf: str = leaf) -> None:
                begins[leaf] = time.perf_counter()

            def end(*_: Any, leaf: str = leaf) -> None:
                spent[leaf] += time.perf_counter() - begins[leaf]

            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(end)
    total = seconds(answer)
    shares = [f"{leaf} {part:.2f} s" for leaf, part in spent.most_common()]
    return ", ".join([*shares, f"rest {total - spent.total():.2f} s"])


def work(flags: argparse.Namespace, folder: str, asked: Connection) -> None:
    """Load a folder in both engines, and answer ``(engine, batch)`` with a turn's seconds.

    ``("profile", batch)`` is answered in words. None ends the process.
    """
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    import modulora_core.hf  # noqa: F401  # from_pretrained then reads packed folders

    llm = LLM(folder, dtype="bfloat16", enforce_eager=not flags.compile, disable_log_stats=True,
              max_model_len=128 + flags.length, enable_prefix_caching=False)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=flags.length, ignore_eos=True)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")

    def by_vllm(batch: int) -> Any:
        prompts = [{"prompt_token_ids": list(range(i, i + PROMPT))} for i in range(batch)]
        return llm.generate(prompts, sampling, use_tqdm=False)

    def by_us(batch: int) -> Any:
        ids = torch.tensor([list(range(i, i + PROMPT)) for i in range(batch)])
        new = {"max_new_tokens": flags.length, "min_new_tokens": flags.length}
        return own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **new)

    engines = {"vLLM": by_vllm, "generate": by_us}
    for answer in engines.values():  # kernels are compiled, and caches filled
        for batch in flags.batches:
            answer(batch)
    asked.send(torch.get_num_threads())
    while (request := asked.recv()) is not None:
        name, batch = request
        if name == "profile":
            turn = partial(by_vllm, batch)
            asked.send(llm.apply_model(lambda model, turn=turn: profile(model, turn))[0])
        else:
            asked.send(seconds(partial(engines[name], batch)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=32, help="new tokens [32]")
    parser.add_argument("--repeats", type=int, default=3, help="turns [3]")
    parser.add_argument("--compile", action="store_true", help="vLLM's default, without eager mode")
    parser.add_argument("--profile", action="store_true")
    flags = parser.parse_args()
    # the engine in the folder's process, whose layers a profile can hook
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    context, workers = multiprocessing.get_context("spawn"), dict[str, Connection]()
    for folder in flags.folders:
        workers[folder], theirs = context.Pipe()
        context.Process(target=work, args=(flags, folder, theirs), daemon=True).start()
        print(f"{folder}: {workers[folder].recv()} threads", flush=True)
    turns = [(f, name, n) for f in workers for name in ("vLLM", "generate") for n in flags.batches]
    best = dict.fromkeys(turns, 0.0)
    for _ in range(flags.repeats):
        for folder, name, batch in turns:
            took = ask(workers[folder], name, batch)
            rate = batch * flags.length / took
            best[folder, name, batch] = max(best[folder, name, batch], rate)
    for folder in workers:
        for name in ("vLLM", "generate"):
            rates = " | ".join(f"{best[folder, name, batch]:.1f}" for batch in flags.batches)
            print(f"| {Path(folder).name} | {name} | {rates} |", flush=True)
    if flags.profile:
        for folder, worker in workers.items():
            print(Path(folder).name, ask(worker, "profile", flags.batches[1]), sep=": ", flush=True)
    for worker in workers.values():
        worker.send(None)


def ask(worker: Connection, *request: Any) -> Any:
    worker.send(request)
    return worker.recv()


if __name__ == "__main__":
    main()
