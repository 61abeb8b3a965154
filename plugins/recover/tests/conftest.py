"""A tiny packed Llama with its dense model, and short recoveries of it."""

import pytest
from modulora_recover.config import RecoverConfig

from modulora_core.data.sources import pydoc_text
from modulora_core.tests.conftest import one_thread, toy, toy_root, tunable  # noqa: F401


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(pydoc_text()[:3000])
    return file


@pytest.fixture
def dense(tunable):  # noqa: F811
    """The dense model that ``tunable`` was quantized from."""
    return tunable.parent / "dense"


@pytest.fixture
def configure(
    tunable,  # noqa: F811
    dense,
    text,
    tmp_path,
):
    """Makes the config of a run of 4 steps without a baseline; options change it."""

    def made(**options):
        defaults = {"model": str(tunable), "out": str(tmp_path / "out"), "data": str(text),
                    "original": str(dense), "batch_size": 2, "grad_accum": 2, "seq_len": 32,
                    "lr": 1e-2, "baseline": False}  # fmt: skip
        length = {} if "epochs" in options else {"steps": 4}
        return RecoverConfig.build({**defaults, **length, **options})

    return made
