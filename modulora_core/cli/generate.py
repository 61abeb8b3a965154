"""``modulora generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from modulora_core.cli.arguments import (
    Adapter,
    Device,
    Dtype,
    Mapped,
    MaxNewTokens,
    Model,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from modulora_core.cli.terminal import Report, terminal

Prompt = Annotated[
    str,
    typer.Argument(metavar="PROMPT", show_default=False, help="The text to answer or continue."),
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Continue the text as it is, also where there is a chat template."),
]


def command(
    model: Model,
    prompt: Prompt,
    adapter: Adapter = None,
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    dtype: Dtype = "auto",
    device: Device = None,
    mapped: Mapped = False,
    seed: Seed = 0,
) -> Report:
    """Answer a prompt, streaming.

    Where the model's tokenizer has a chat template, the prompt is a user's turn in it; --raw continues the plain
    text. Tokens are chosen greedily unless a temperature is given. MODEL may be packed or not.

    Examples:
      modulora generate smollm2-packed "What is the capital of France?"
      modulora generate smollm2-packed "Once upon a time" --raw --temperature 0.8 --top-p 0.95
      modulora generate smollm2-packed "What is a module?" --adapter my-adapter --json
    """
    from modulora_core.devices.memory import PeakMemory
    from modulora_core.inference.generate import Sampling, generate
    from modulora_core.inference.loading import open_to_run

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    opened = open_to_run(model, adapter=adapter, dtype=dtype, device=device, mapped=mapped)
    chat = not raw and opened.tokenizer.chat_template is not None
    language_model = opened.load()
    question = [{"role": "user", "content": prompt}] if chat else prompt
    with PeakMemory(opened.device) as peak:
        result = generate(
            language_model, opened.tokenizer, question, sampling, on_text=terminal().write
        )
    terminal().write("\n")
    terminal().note(f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s")
    return Report({"prompt": prompt, **result.to_json(), "peak_memory_bytes": peak.nbytes})
