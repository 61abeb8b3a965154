"""Changed files of a packed folder, of another tool's folder, and of an adapter.

Each is refused in one line, or the model loads and runs.
"""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.peft_format import read_adapter
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.models.tokenizer import load_tokenizer
from modulora_core.tests.adapted_models import trained
from modulora_core.tests.crude_folders import save_crude
from modulora_core.tests.fuzzing import cases, read_changed, run_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(tunable, tmp_path_factory):
    """A packed folder with a tokenizer."""
    folder = Path(shutil.copytree(tunable, tmp_path_factory.mktemp("fuzz") / "packed"))
    run_once(folder)
    return folder


@pytest.fixture(scope="module")
def crude(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crude")
    save_crude(folder, files=2)
    run_once(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(trained(load_model(packed)), folder)
    return folder


@cases(150)
@given(data=st.data())
def test_a_changed_packed_folder_is_refused_or_runs(packed, data):
    read_changed(packed, ["*config.json", "*.safetensors"], data, lambda: run_once(packed))


@cases(50)
@given(data=st.data())
def test_a_changed_tokenizer_is_refused_or_read(packed, data):
    read_changed(packed, ["tokenizer*.json"], data, lambda: load_tokenizer("a model", packed))


@cases(75)
@given(data=st.data())
def test_a_changed_foreign_folder_is_refused_or_runs(crude, data):
    read_changed(crude, ["*.json", "*.safetensors"], data, lambda: run_once(crude))


@cases(150)
@given(data=st.data())
def test_a_changed_adapter_is_refused_or_loaded(packed, adapter, data):
    def read():
        read_adapter(adapter)  # the most are refused here, where no model is needed yet
        load_adapter(load_model(packed), adapter)

    read_changed(adapter, ["*.json", "*.safetensors"], data, read)
