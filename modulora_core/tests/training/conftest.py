"""Short finetuning runs on a tiny packed Llama."""

import pytest

from modulora_core.data.sources import pydoc_text
from modulora_core.training.config import FinetuneConfig


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(pydoc_text()[:3000])
    return file


@pytest.fixture
def configure(tunable, text, tmp_path):
    """Makes the config of a run of 4 steps without report; options change it."""

    def made(**options):
        defaults = {"model": str(tunable), "out": str(tmp_path / "out"), "data": str(text),
                    "batch_size": 2, "grad_accum": 2, "seq_len": 32, "lr": 1e-2,
                    "baseline": False}  # fmt: skip
        length = {} if "epochs" in options else {"steps": 4}
        return FinetuneConfig.build({**defaults, **length, **options})

    return made
