"""Refuse a tokenizer.json with which the library tokenizers would end the process, or panic.

Its normalizers may multiply a text, and the charsmap of one tells how much memory it needs. A panic
of Rust is a BaseException in Python, which ``except Exception`` does not catch.
"""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modulora_core.errors import ModelError
from modulora_core.models.json_files import read_bytes

_MOST_BYTES = 256 * 2**20
_MOST_GROWTH = 64
_SCRIPT = str(Path(__file__).with_name("tokenizer_worker.py"))

SECONDS = 60
"""The computing time of converting a SentencePiece model; one of 256,000 pieces takes some 10."""

MEMORY = 2 * 2**30
"""The bytes that it may take."""
_LISTS = ("normalizers", "decoders")


def check_tokenizer_file(path: Path) -> None:
    """Check the normalizers and decoders of a tokenizer.json. Raises ModelError."""
    check_steps(path, read_bytes(path, ModelError, _MOST_BYTES))


def check_steps(path: Path, text: str | bytes) -> None:
    """As :func:`check_tokenizer_file`, for the text of such a file."""
    try:
        described = json.loads(text)
        steps = [*_steps(described.get("normalizer")), *_steps(described.get("decoder"))]
        growth = math.prod(_growth(step) for step in steps)
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return  # the library refuses it with a better reason
    if growth > _MOST_GROWTH:
        raise ModelError(
            f"{path}: expected normalizers and decoders that make a text at most {_MOST_GROWTH} "
            f"times as long, got {growth:,.0f} times; take another tokenizer"
        )
    for step in steps:
        if step.get("type") == "Precompiled":
            _check_charsmap(path, base64.b64decode(step.get("precompiled_charsmap") or ""))


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    if isinstance(step, dict):
        yield step
        for name in _LISTS:
            for inner in step.get(name) or ():
                yield from _steps(inner)


def _growth(step: dict[str, Any]) -> float:
    """The factor by which a replacement may lengthen a text, in characters."""
    if step.get("type") != "Replace":
        return 1
    length, pattern = len(step["content"]), step["pattern"]
    if pattern.get("String"):
        return max(1, length / len(pattern["String"]))
    return 1 + length  # a regular expression, or "", may match before each character


def _check_charsmap(path: Path, charsmap: bytes) -> None:
    """Check the size that the first 4 bytes tell: a trie of so many bytes follows."""
    size, rest = int.from_bytes(charsmap[:4], "little"), len(charsmap) - 4
    if rest < 0 or size % 4 or size > rest:
        raise ModelError(
            f"{path}: precompiled_charsmap: expected a trie of at most {max(rest, 0)} bytes, got "
            f"{size}; download it again"
        )


def check_sentencepiece(folder: Path, file: str) -> None:
    """Load a SentencePiece model in a process with limits. Raises ModelError: it fails there."""
    command = [sys.executable, "-P", _SCRIPT, str(folder), str(SECONDS), str(MEMORY)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        said = done.stdout.decode("ascii", "replace").strip()
        reason = said or (
            f"it takes more than {SECONDS} seconds or {MEMORY // 2**20} MiB, or ends the process"
        )
        raise ModelError(
            f"{folder / file}: expected a tokenizer that transformers can read, got: {reason}; "
            "download it again, or take another tokenizer"
        )


@contextmanager
def panics_refused(subject: str) -> Iterator[None]:
    """Make a panic of the library tokenizers a ModelError about ``subject``."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{subject}: the library tokenizers fails on it: {' '.join(str(error).split())[:200]}; "
            "take another tokenizer"
        ) from None
