"""Tokens a second of vLLM and of transformers' ``generate``, by batch, for several folders.

    python examples/benchmarks/serving.py dense-folder nf4-folder qtip-folder

Needs vLLM (`make test-vllm` builds such an environment). Each model has a process of its own, and
the engines take turns. ``--profile`` also prints which layers take vLLM's time at the middle batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(answer: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    answer()
    return time.perf_counter() - begin


def profile(model: Any, answer: Callable[[], Any]) -> str:
    """The share of vLLM's kinds of layers in a turn. A layer's time contains no other's here."""
    spent, begins = Counter[str](), dict[int, float]()
    kinds = {"Linear": "linear layers", "LogitsProcessor": "head", "Attention": "attention"}

    def end(layer: Any, *_: Any) -> None:
        kind = next(kinds[end] for end in kinds if type(layer).__name__.endswith(end))
        spent[kind] += time.perf_counter() - begins[id(layer)]

    for layer in model.modules():
        name = type(layer).__name__
        if name.endswith(("ParallelLinear", "LogitsProcessor")) or name == "Attention":
            layer.register_forward_pre_hook(
                lambda layer, _: begins.update({id(layer): time.perf_counter()})
            )
            layer.register_forward_hook(end)
    total = seconds(answer)
    shares = [f"{kind} {part / total:.0%}" for kind, part in spent.most_common()]
    return ", ".join([*shares, f"rest {1 - spent.total() / total:.0%}"])


def measure(flags: argparse.Namespace, folder: str) -> None:
    """Print a row of the table: of each engine, tokens a second by batch."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    import modulora_core.hf  # noqa: F401  # from_pretrained then reads packed folders

    llm = LLM(folder, dtype="bfloat16", enforce_eager=not flags.compile, max_model_len=256,
              enable_prefix_caching=False, disable_log_stats=True)  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=flags.length, ignore_eos=True)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")

    def by_vllm(batch: int) -> Any:
        prompts = [{"prompt_token_ids": list(range(i, i + 16))} for i in range(batch)]
        return llm.generate(prompts, params, use_tqdm=False)

    def by_us(batch: int) -> Any:
        ids = torch.tensor([list(range(i, i + 16)) for i in range(batch)])
        new = {"max_new_tokens": flags.length, "min_new_tokens": flags.length}
        return own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **new)

    engines = {"vLLM": by_vllm, "generate": by_us}
    for answer in engines.values():
        answer(1), answer(max(flags.batches))
    best = {(name, batch): 0.0 for name in engines for batch in flags.batches}
    for _ in range(flags.repeats):
        for name, batch in best:
            rate = batch * flags.length / seconds(lambda n=name, b=batch: engines[n](b))
            best[name, batch] = max(best[name, batch], rate)
    for name in engines:
        rates = " | ".join(f"{best[name, batch]:.1f}" for batch in flags.batches)
        print(f"| {Path(folder).name} | {name} | {rates} |", flush=True)
    if flags.profile:
        middle = flags.batches[len(flags.batches) // 2]
        llm.apply_model(lambda model: print(
            "batch", middle, profile(model, lambda: by_vllm(middle)), flush=True))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=32, help="new tokens (32)")
    parser.add_argument("--repeats", type=int, default=3, help="the best turn counts (3)")
    parser.add_argument("--compile", action="store_true", help="vLLM without eager mode")
    parser.add_argument("--profile", action="store_true")
    flags = parser.parse_args()
    # the engine in our process, whose layers a profile can hook
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    for folder in flags.folders:  # vLLM loads one model in a process
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(flags, folder))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
