"""Any data file is read, or refused in one line; records that were written come back."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulora_core.data.examples import load_examples
from modulora_core.data.files import read_records
from modulora_core.data.text import load_text
from modulora_core.tests.fuzzing import cases, changed_bytes, read_or_refused
from modulora_core.tests.tiny_tokenizer import make_tokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=30)
ROWS = st.lists(st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}), min_size=1)
SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".parquet"])


def written(rows, suffix):
    """A data file of the records."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        return text.getvalue().encode()
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "templated"])
def tokenizer(request):
    return make_tokenizer(template=request.param)


def read_as_all(path, tokenizer):
    """Read a file in each of the ways in which commands read it."""
    read_or_refused(lambda: load_examples(str(path), tokenizer, seq_len=16))
    read_or_refused(lambda: load_text(str(path), tokenizer))


@pytest.mark.slow
@cases(100)
@given(rows=ROWS, suffix=SUFFIXES)
def test_records_come_back(rows, suffix, tmp_path):
    file = tmp_path / f"data{suffix}"
    file.write_bytes(written(rows, suffix))
    assert [record.fields for record in read_records(file)] == rows


@pytest.mark.slow
@cases(100)
@given(data=st.data())
def test_a_changed_file_is_read_or_refused(data, tmp_path, tokenizer):
    rows = [{"instruction": f"say {n}", "output": str(n)} for n in range(9)]
    suffix = data.draw(SUFFIXES | st.just(".txt"))
    content = b"To be.\n\nOr not.\n" if suffix == ".txt" else written(rows, suffix)
    file = tmp_path / f"data{suffix}"
    file.write_bytes(changed_bytes(data, content))
    read_as_all(file, tokenizer)
