"""``modulora report``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from modulora_core.cli.arguments import Device, argument, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.errors import OutputError
from modulora_core.progress import Bars

Folder = Annotated[Path, argument("ADAPTER", "The folder of a finished run of finetune.")]
Out = Annotated[
    Path | None, option("--out FILE", "The page to write.", default="ADAPTER/report.html")
]
Samples = Annotated[
    bool, option("--samples", "Load the model, and add answers without and with the adapter.")
]


def command(
    adapter: Folder, out: Out = None, samples: Samples = False, device: Device = None
) -> Report:
    """Write a page about a finished finetuning run, for a browser.

    The page has the curves of the run, its losses and its settings, from the log in ADAPTER. With
    --samples the model answers five prompts of its data.

    Examples:
        modulora report adapter
        modulora report adapter --out run.html --samples
    """
    from rich.console import Group

    from modulora_compare.report.page import REPORT_FILE, page
    from modulora_compare.report.run import adapter_run, read_run
    from modulora_core.checkpoints.outputs import write_file

    written = out or adapter / REPORT_FILE
    if written.is_dir():
        raise OutputError(f"--out {written}: expected a file, got a folder; add a name")
    config, log = read_run(adapter)
    answered = []
    if samples:
        from modulora_compare.report.samples import sample_answers

        answered = sample_answers(adapter, config, log, device, Bars(terminal().progress))
    write_file(written, page(adapter_run(adapter, config, log, answered)))
    json = {"page": str(written), "samples": len(answered)}
    shown = facts({"page": written, "samples": len(answered) or None})
    follow = next_commands(f"open {shlex.quote(str(written))} in a browser")
    return Report(json, Group(shown, follow))
