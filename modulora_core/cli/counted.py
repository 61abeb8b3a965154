"""Numbers of things, as people write them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``"1 tensor"``, ``"2,048 tensors"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
