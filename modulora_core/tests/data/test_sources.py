"""A SOURCE is read as records that know their place; a wrong one is refused with file and line."""

import csv
import itertools
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulora_core.data import load_examples
from modulora_core.data.sources import Slice, load_records
from modulora_core.data.text import load_text
from modulora_core.errors import DataError, MissingExtraError
from modulora_core.tests.tiny_tokenizer import make_tokenizer

ROWS = [
    {"prompt": f"question {i}", "completion": f'a "quoted", comma\'d\nanswer {i}'} for i in range(7)
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_jsonl(path):
    return write(path, "".join(json.dumps(row) + "\n" for row in ROWS))


def as_json(path):
    return write(path, json.dumps(ROWS, indent=2))


def as_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("save", "suffix", "third"),
    [
        (as_jsonl, "jsonl", "line 3"),
        (as_json, "json", "record 3"),
        (as_csv, "csv", "line 6"),  # after the header and two rows of two lines
        (as_parquet, "parquet", "row 3"),
    ],
)
def test_every_file_kind_gives_the_same_records(tmp_path, save, suffix, third):
    path = save(tmp_path / f"data.{suffix}")
    records = load_records(path)
    assert [dict(record.fields) for record in records] == ROWS
    assert records[2].place == f"{path}, {third}"
    assert load_records(f"{path}[50%:]") == records[4:]


def test_text_files_and_lines_are_read_as_they_are(tmp_path):
    text = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n"
    (record,) = load_records(write(tmp_path / "d.jsonl", text))
    assert record.fields["text"] == "a\u2028b\x85c", "these are no ends of lines"
    limit = csv.field_size_limit()
    (record,) = load_records(write(tmp_path / "d.csv", f"text\n{'x' * (limit + 1)}\n"))
    assert len(record.fields["text"]) == limit + 1
    assert csv.field_size_limit() == limit
    path = write(tmp_path / "d.TXT", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert load_text([path, f"{tmp_path / 'd.jsonl'}"]) == "one\ntwo\n\n\na\u2028b\x85c"


MALFORMED = {
    "empty.txt": (b"", "line 1: expected text, got an empty file"),
    "latin.txt": (b"ok\ncaf\xe9\n", "line 2: expected UTF-8, got byte 0xe9"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": "b\n', "line 3: Invalid JSON: EOF while parsing"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', "Invalid JSON: .* line 2 .* a .jsonl file"),
    "object.json": (b'{"text": "a"}', "line 1: expected a list of objects, got {"),
    "header.csv": (b"prompt,completion\n", "line 1: expected one or more records, got none"),
    "twice.csv": (b"text,text\na,b\n", "line 1: expected distinct column names"),
    "blank.csv": (b"\nprompt,completion\na,b\n", "line 1: expected column names, got a blank line"),
    "short.csv": (b'a,b\n"a\nb",c\n\nonly\n', r"line 5: expected 2 columns \(a, b\), got 1"),
    "quote.csv": (
        b'text\nfine\n"open\n',
        "line 3: expected values separated by ',', .*got unexpected",
    ),
    "not.parquet": (b"PAR?", "expected a parquet file, got"),
    "table.xml": (b"<a/>", r"expected a file that ends in one of .txt, .*, got '.xml'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, name):
    content, message = MALFORMED[name]
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        load_records(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "missing.jsonl: expected a file, and there is none"),
        ("imdb", "expected a file that exists, pydoc, or a Hub dataset as org/name"),
        ("pydoc[5:]", r"expected a slice in percent such as \[:90%\] .*, got \[5:\]"),
        ("pydoc[60%:40%]", r"slice \[60%:40%\]: expected 0% <= start < stop <= 100%"),
        ("few.jsonl[:10%]", r"\[0%:10%\]: expected one or more records, and this slice of 3 has"),
        ("blank.txt[:40%]", "expected text, and this slice of .* has none"),
        ([], "got nothing"),
        (5, "expected a file, a Hub dataset id, pydoc, or records, got 5"),
        ("a\0b", r"'a\\x00b': expected a file that exists"),
        ("x" * 5000, "'x+': expected a file, .* got no possible name"),
    ],
)
def test_a_source_that_is_not_there_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "few.jsonl", '{"text": "a"}\n' * 3)
    write(tmp_path / "blank.txt", " \n\n \n\n \n\nend")
    with pytest.raises(DataError, match=message):
        load_records(source)


@given(
    text=st.text(st.sampled_from("ab \n"), min_size=1, max_size=120),
    cuts=st.lists(st.integers(1, 99), unique=True, max_size=5),
)
def test_slices_that_meet_partition_the_text_and_the_records(text, cuts):
    slices = [Slice(a, b) for a, b in itertools.pairwise([0, *sorted(cuts), 100])]
    assert "".join(part.of_text(text) for part in slices) == text
    edges = [edge for part in slices for edge in part.rows(len(text))]
    assert edges[1:-1:2] == edges[2::2]
    assert (edges[0], edges[-1]) == (0, len(text))


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A dataset called ``org/name``: the library reads the folder as it reads the Hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    (tmp_path / "org" / "name").mkdir(parents=True)
    for split, labels in {"train": [0, 1, -1], "test": [1]}.items():
        rows = {"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.to_parquet(tmp_path / "org" / "name" / f"{split}.parquet")
    datasets.disable_progress_bars()
    yield "org/name"
    datasets.enable_progress_bars()


def test_a_hub_dataset_gives_its_split_and_the_names_of_its_classes(hub_folder):
    train = load_records(hub_folder)
    assert [dict(record.fields) for record in train] == [
        {"text": "train 0", "label": "no"},
        {"text": "train 1", "label": "yes"},
        {"text": "train 2", "label": None},
    ]
    assert train[1].place == "org/name, row 2"
    for name in ("org/name:test", "org/name:default:test"):
        assert [record.fields["text"] for record in load_records(name)] == ["test 0"]
    assert load_records("org/name[50%:]") == train[2:]
    with pytest.raises(DataError, match=r"org/name:dev: .* the split 'dev' \(say FOLDER:split\)"):
        load_records("org/name:dev")


@pytest.mark.parametrize(("module", "name"), [("datasets", "org/name"), ("pyarrow", "d.parquet")])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    tmp_path, monkeypatch, module, name
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    with pytest.raises(MissingExtraError, match=rf"{module}.*pip install 'modulora-core\[data\]'"):
        load_records(name)


# records of a Python program


def test_dicts_and_datasets_are_records_that_know_their_number():
    datasets = pytest.importorskip("datasets")
    for rows in (ROWS, datasets.Dataset.from_list(ROWS)):
        records = load_records(rows)
        assert [record.fields for record in records] == ROWS
        assert records[2].place == "record 3"
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    labelled = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    assert load_records(labelled)[0].fields == {"text": "a", "label": "good"}
    with pytest.raises(DataError, match=r"expected one split, such as data\['train'\]"):
        load_records({"train": ROWS})


READERS = {
    "examples": lambda file: load_examples(file, make_tokenizer(), seq_len=16),
    "text": load_text,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_other_fields_is_refused_after_its_first_record(tmp_path, reader):
    for first in ('{"a": 1}', "{}"):
        file = write(tmp_path / "data.jsonl", f"{first}\n{{\n")  # line 2 is no JSON
        with pytest.raises(DataError, match=r"data\.jsonl, line 1: "):
            READERS[reader](str(file))
