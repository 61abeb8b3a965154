"""Changed files of a GPTQ folder.

Each is refused in one line, or the model loads and runs.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulora_core.tests.fuzzing import cases, read_changed, run_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(gptq: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gptq")
    gptq.save_gptq(path, permuted=True, others={"up_proj": (8, 16)}, dynamic={
        r"+:.*up_proj$": {"bits": 8}, r"-:^lm_head$": {}})  # fmt: skip
    run_once(path)
    return path


@cases(60)
@given(data=st.data())
def test_a_changed_folder_is_refused_or_runs(folder: Path, data: st.DataObject) -> None:
    read_changed(folder, ["config.json", "*.safetensors"], data, lambda: run_once(folder))
