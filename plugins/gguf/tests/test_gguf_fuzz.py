"""Changed GGUF files are refused in one line, or the model loads and runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf

from modulora_core.models.source import open_dense
from modulora_core.tests.fuzzing import cases, changed_bytes, read_or_refused, run_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write_tiny_gguf("llama", tmp_path_factory.mktemp("gguf") / "m.gguf", "Q4_0")
    run_once(path)
    return path.read_bytes()


def open_whole(path):
    """As quantize reads a GGUF file."""
    source = open_dense(str(path))
    for _ in source.tensors():
        pass
    source.tokenizer()


@pytest.mark.parametrize("read", [run_once, open_whole])
@cases(60)
@given(data=st.data())
def test_a_changed_file_is_refused_or_read(read, whole, tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(changed_bytes(data, whole))
    read_or_refused(lambda: read(path))
