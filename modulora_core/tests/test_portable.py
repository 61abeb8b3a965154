"""The whole job works where Linux's own parts are missing, as on macOS and Windows."""

import mmap
import os
import signal
import sys
from pathlib import Path

import pytest

from modulora_core import FinetuneConfig, Sampling, finetune, generate, quantize
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.tests.adapted_models import save_llama_with_tokenizer

TEXT = "The with statement wraps a block. " * 60


@pytest.fixture(params=["macOS", "Windows"])
def elsewhere(request, monkeypatch):
    """Hide /proc, and what the standard library lacks on that system."""
    for name in ("exists", "is_file", "read_text", "write_text", "open"):
        real = getattr(Path, name)

        def without_proc(self, *words, _real=real, **more):
            if self.parts[:2] == ("/", "proc"):
                if _real.__name__ in ("exists", "is_file"):
                    return False
                raise FileNotFoundError(self)
            return _real(self, *words, **more)

        monkeypatch.setattr(Path, name, without_proc)
    if request.param == "Windows":
        for module in ("fcntl", "resource"):
            monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
        monkeypatch.delattr(os, "sysconf")
        monkeypatch.delattr(signal, "setitimer")
        for name in ("MADV_DONTNEED", "MADV_WILLNEED"):
            monkeypatch.delattr(mmap, name)
    return str(request.param)


def test_quantizing_finetuning_and_generating_work(elsewhere, tmp_path, toy):
    save_llama_with_tokenizer(tmp_path / "dense")
    (tmp_path / "notes.txt").write_text(TEXT, "utf-8")
    packed, adapter, notes = (str(tmp_path / name) for name in ("packed", "adapter", "notes.txt"))
    quantize(tmp_path / "dense", packed, "toy")
    config = FinetuneConfig(
        model=packed, out=adapter, data=notes, steps=2, batch_size=1, seq_len=16, baseline=False
    )
    result = finetune(config, progress=False)
    assert len(result.losses) == 2
    answer = generate(packed, "The with", Sampling(2), adapter=adapter)
    assert answer.tokens >= 1
    with PeakMemory() as peak:
        pass
    assert (peak.nbytes == 0) == (elsewhere == "Windows")
