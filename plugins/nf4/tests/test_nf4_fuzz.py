"""Changed files of a folder that bitsandbytes quantized to 4 bits.

Each is refused in one line, or the model loads and runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

from modulora_core.tests.fuzzing import cases, read_changed, run_once
from modulora_core.tests.other_tools import save_quantized

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    path = tmp_path_factory.mktemp("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    save_quantized(path, BitsAndBytesConfig(load_in_4bit=True, **options))
    run_once(path)
    return path


@cases(60)
@given(data=st.data())
def test_a_changed_folder_is_refused_or_runs(folder: Path, data: st.DataObject) -> None:
    read_changed(folder, ["config.json", "*.safetensors"], data, lambda: run_once(folder))
