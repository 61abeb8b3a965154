"""Divide the memory of a training step over the processes of a distributed run.

DDP copies everything to each process, and holds the adapter's gradients in buckets too. FSDP2
divides weights, adapter and optimizer, and gathers a decoder block when the block runs. Memory of
the backends (NCCL, gloo) is not in a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from modulora_planner.model import PlannedModel
from modulora_planner.request import PlanRequest

DIVIDED = (
    "packed_codes", "packed_scales", "embeddings_and_head", "norms_and_biases", "adapter",
    "gradients", "optimizer",
)  # fmt: skip
"""Items that FSDP2 divides."""

GATHERED_BLOCKS = 2
"""Blocks in memory at once: the running block, and its copy as it arrived, or the next block."""


def divided(
    items: Mapping[str, float], packed: PlannedModel, request: PlanRequest
) -> Mapping[str, float]:
    """The items of one process; ``items`` are of a run in one process."""
    if request.processes == 1:
        return items
    if not request.config.shard:
        return {**items, "gradients": items.get("gradients", 0) + items["adapter"]}
    parts = {name: items[name] / request.processes for name in DIVIDED if name in items}
    return {**items, **parts, "gathered": _gathered(items, packed)}


def _gathered(items: Mapping[str, float], packed: PlannedModel) -> float:
    """Bytes of the largest blocks, and of the head, which stays from the loss to its backward."""
    blocks: Counter[str] = Counter()
    for name, site in packed.record.items():
        tensors = site.layout.tensors.values()
        blocks[packed.block_of(name)] += (site.experts or 1) * sum(t.nbytes for t in tensors)
    head_and_table = blocks.pop("", 0) + items.get("embeddings_and_head", 0)
    tied = packed.dense.config.get_text_config().tie_word_embeddings
    adapter = items["adapter"] / max(1, len(blocks))
    block = max(blocks.values(), default=0) + adapter
    return GATHERED_BLOCKS * block + head_and_table / (1 if tied else 2)
