"""Tokens a second of vLLM and of transformers' ``generate``, by batch, for several folders.

    python examples/benchmarks/serving.py dense-folder nf4-folder qtip-folder --profile

Needs vLLM (`make test-vllm` builds such an environment). Each folder has a process of its own, and
the engines take turns in it. A turn answers each prompt of 16 tokens with ``--length`` tokens, in
bf16; the fastest turn counts. ``--profile`` adds which layers take vLLM's time at the second batch.
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


def measure(flags: argparse.Namespace, folder: str) -> None:
    """Print a row of the table for each engine: tokens a second by batch."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    import modulora_core.hf  # noqa: F401  # from_pretrained then reads packed folders

    llm = LLM(folder, dtype="bfloat16", enforce_eager=not flags.compile, disable_log_stats=True,
              max_model_len=PROMPT + flags.length, enable_prefix_caching=False)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=flags.length, ignore_eos=True)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    print(f"{Path(folder).name}: {torch.get_num_threads()} threads", flush=True)

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
    best = {(name, batch): 0.0 for name in engines for batch in flags.batches}
    for _ in range(flags.repeats):
        for name, batch in best:
            took = seconds(lambda name=name, batch=batch: engines[name](batch))
            best[name, batch] = max(best[name, batch], batch * flags.length / took)
    for name in engines:
        rates = " | ".join(f"{best[name, batch]:.1f}" for batch in flags.batches)
        print(f"| {Path(folder).name} | {name} | {rates} |", flush=True)
    if flags.profile:
        batch = flags.batches[1]

        def show(model: Any) -> None:
            print(f"batch {batch}:", profile(model, lambda: by_vllm(batch)), flush=True)

        llm.apply_model(show)


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
    # the engine in our process, whose layers a profile can hook
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for folder in flags.folders:  # vLLM loads one model in a process
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(flags, folder))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
