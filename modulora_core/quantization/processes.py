"""Refuse work that the processes of a distributed run cannot divide."""

from __future__ import annotations

from modulora_core.calibration import CalibrationText
from modulora_core.distributed import world_size
from modulora_core.errors import OptionError


def check_processes(text: CalibrationText | None, *, budget: bool) -> None:
    """Refuse a budget, tuning, and fewer samples than processes. Raises OptionError."""
    processes = world_size()
    if processes == 1:
        return
    tuning = text is not None and text.config.tuning is not None
    for name, asked in (("budget", budget), ("tuning", tuning)):
        if asked:
            raise OptionError(
                f"{name}: expected one process, got {processes}; start it without torchrun"
            )
    if text is not None and len(text.ids) < processes:
        raise OptionError(
            f"calibration: expected a sample for each of {processes} processes, got "
            f"{len(text.ids)}; give more text or fewer processes"
        )
