"""``modulora finetune-packed``. Its options are the fields of RoundsConfig that fit rounds."""

from __future__ import annotations

import shlex
from typing import Any

from modulora_core.cli.finetune import CHECKS_PLACES as CHECKS_PLACES
from modulora_core.cli.finetune import PANELS as FINETUNE_PANELS
from modulora_core.cli.finetune import checked_request, note_eval, signature
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.progress import Bars
from modulora_merge.config import LEFT_OUT, RoundsConfig

PANELS = {
    "Rounds": ("merge_every", "merge_data", "merge_samples", "merge_seq_len"),
    **{
        title: tuple(name for name in names if name not in LEFT_OUT)
        for title, names in FINETUNE_PANELS.items()
    },
}


def command(config: str | None = None, resume: bool = False, **options: Any) -> Report:
    """Train an adapter and merge it into the packed weights, once or in rounds.

    OUT is one packed model with the format, the types and the size of MODEL, and no adapter
    beside it. The merge is that of `merge-packed`, with the training data. --merge-every makes
    rounds: each trains a fresh adapter, merges it, and goes on with the new weights. The learning
    rate has one schedule over all rounds.

    Examples:
        modulora finetune-packed smollm2-nf4 trained --data notes.txt --steps 400
        modulora finetune-packed model.gguf trained.gguf --data chats.jsonl --steps 300
        modulora finetune-packed smollm2-nf4 trained --data notes.txt --steps 400 --resume
    """
    request = checked_request(RoundsConfig, options, config)
    request.rounds()  # refuses what does not fit, before torch is imported
    from rich.console import Group

    from modulora_core.training.loss_trend import loss_in_words
    from modulora_merge.rounds import finetune_packed

    result = finetune_packed(
        request, resume=resume, on_eval=note_eval, progress=Bars(terminal().progress)
    )
    shown = result.to_json()
    shown["losses"] = loss_in_words(result.losses).removeprefix("loss ")
    shown["changed"] = ", ".join(f"{share:.2%}" for share in result.changed)
    out = shlex.quote(request.out)
    following = next_commands(f"modulora evaluate {out}", f"modulora chat {out}")
    return Report(result.to_json(), Group(facts(shown), following))


command.__signature__ = signature(RoundsConfig, *LEFT_OUT)  # type: ignore[attr-defined]  # typer's
