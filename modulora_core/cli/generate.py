"""``modulora generate``."""

from __future__ import annotations

from typing import Annotated

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import argument, option
from modulora_core.cli.terminal import Report, terminal

Prompt = Annotated[str, argument("PROMPT", "The text to answer or continue.")]
Raw = Annotated[bool, option("--raw", "Continue the text, without the chat template.")]


def command(
    model: shared.Model,
    prompt: Prompt,
    adapter: shared.Adapter = None,
    raw: Raw = False,
    max_new_tokens: shared.MaxNewTokens = 256,
    temperature: shared.Temperature = 0.0,
    top_p: shared.TopP = 1.0,
    top_k: shared.TopK = 0,
    repetition_penalty: shared.RepetitionPenalty = 1.0,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    mapped: shared.Mapped = False,
    parity_check: shared.ParityCheck = True,
    seed: shared.Seed = 0,
) -> Report:
    """Answer a prompt, and print tokens as they come.

    If the model's tokenizer has a chat template, the prompt is a user's message; --raw continues
    the text instead. Decoding is greedy unless you give a temperature. MODEL is packed or dense.

    Examples:
        modulora generate smollm2-packed "Name the capital of France."
        modulora generate smollm2-packed "Once upon a time" --raw --temperature 0.8
        modulora generate smollm2-packed "Name a module." --adapter adapter --json
    """
    from modulora_core.checkpoints.peak_memory import PeakMemory
    from modulora_core.inference.generate import generate
    from modulora_core.inference.opened import open_to_run
    from modulora_core.models.generation import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    opened = open_to_run(
        model, adapter=adapter, dtype=dtype, device=device, mapped=mapped, parity_check=parity_check
    )
    with PeakMemory(opened.device) as peak:
        result = generate(opened, prompt, sampling, raw=raw, on_text=terminal().write)
    terminal().write("\n")
    terminal().note(f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s")
    return Report({"prompt": prompt, **result.to_json(), "peak_memory_bytes": peak.nbytes})
