"""Draws the memory to finetune an 8 B and a 70 B model, as README shows it.

    python examples/benchmarks/memory_chart.py --folder docs     # memory-light.svg, memory-dark.svg
    python examples/benchmarks/memory_chart.py --table           # 1 B to 70 B, in Markdown

`modulora plan` computes every bar, for the same run: one sequence of 512 tokens, bfloat16, gradient
checkpointing. The shapes are Llama 3's, with LoRA of rank 8 on all linear layers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from modulora_planner import plan
from transformers import LlamaConfig

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SHAPES = {  # Llama 3's; 14 B and 32 B are Qwen 3's, with the vocabulary of Llama 3
    "1 B": (2048, 8192, 16, 32, 64),
    "3 B": (3072, 8192, 28, 24, 128),
    "8 B": (4096, 14336, 32, 32, 128),
    "14 B": (5120, 17408, 40, 40, 128),
    "32 B": (5120, 25600, 64, 64, 128),
    "70 B": (8192, 28672, 80, 64, 128),
}
DRAWN = ("8 B", "70 B")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, 16 bits": ("none", {}),
    "4 bits (nf4)": ("nf4", {}),
    "3 bits (optq)": ("optq", {"bits": 3}),
    "2 bits (quip-sharp-e8)": ("quip-sharp-e8", {}),
}
COLORS = {"light": ("#24292f", "#8c959f", "#0969da"), "dark": ("#e6edf3", "#6e7681", "#58a6ff")}


def planned(model: str) -> dict[str, float]:
    """GiB of training by row."""
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            **dict(zip(NAMES, SHAPES[model], strict=True)), num_key_value_heads=8,
            vocab_size=128256, tie_word_embeddings=model in ("1 B", "3 B"), dtype="bfloat16",
            max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        config.save_pretrained(folder)
        run = {"device": "cuda", "batch_size": 1, "seq_len": 512}
        return {
            row: plan(folder, name, options, **run).training.nbytes / 2**30
            for row, (name, options) in ROWS.items()
        }


def draw(figures: dict[str, dict[str, float]], path: Path, mode: str) -> None:
    ink, grey, blue = COLORS[mode]
    figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="none")
    for axes, (model, found) in zip(figure.subplots(2, 1), figures.items(), strict=True):
        own = [blue if "bits (" in row else grey for row in found]
        # the figure stands beside the name, where no line crosses it
        axes.barh(
            [f"{row}   {gib:.1f}" for row, gib in found.items()], [*found.values()], color=own
        )
        axes.axvline(24, color=ink, linestyle=":", linewidth=1)
        title = f"{model} model: GiB to finetune, computed (batch 1, 512 tokens)"
        axes.set_title(title, loc="left", color=ink, fontsize=11)
        axes.invert_yaxis()
        axes.margins(x=0.02)
        axes.set_facecolor("none")
        axes.tick_params(colors=ink, length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks([24], ["24 GiB card"])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": mode}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    parser.add_argument("--table", action="store_true", help="print a table; draw nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(f"| model | {' | '.join(ROWS)} |\n{'|-' * (len(ROWS) + 1)}|")
        for model in SHAPES:
            print(f"| {model} | {' | '.join(f'{gib:.1f}' for gib in planned(model).values())} |")
        raise SystemExit
    figures = {model: planned(model) for model in DRAWN}
    for mode in COLORS:
        draw(figures, arguments.folder / f"memory-{mode}.svg", mode)
    for model, found in figures.items():
        print(model, *(f"{row}: {gib:.1f} GiB" for row, gib in found.items()), sep="\n  ")
