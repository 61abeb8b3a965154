"""Tiny packed models with a trained adapter, and a text."""

import pytest

from modulora_core.calibration import CalibrationConfig
from modulora_core.data.sources import pydoc_text
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.conftest import one_thread, toy, toy_root  # noqa: F401
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(pydoc_text()[:20000])
    return file


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """``trained(quantizer, options)`` packs a tiny Llama and trains an adapter on it."""
    made = {}

    def folders(quantizer, options=None):
        key = quantizer, str(options)
        if key not in made:
            root = tmp_path_factory.mktemp(quantizer)
            save_llama_with_tokenizer(root / "dense")
            inputs = CalibrationConfig(str(text), samples=8, seq_len=32, weighting="none")
            quantize(
                str(root / "dense"), root / "packed", quantizer, options or {},
                calibration=inputs if quantizer == "optq" else None,
            )  # fmt: skip
            finetune(FinetuneConfig(
                model=str(root / "packed"), out=str(root / "adapter"), data=str(text), steps=40,
                batch_size=4, seq_len=32, lr=1e-2, rank=8, baseline=False,
            ))  # fmt: skip
            made[key] = root / "packed", root / "adapter"
        return made[key]

    return folders
