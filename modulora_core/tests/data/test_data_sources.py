from __future__ import annotations

import csv
import itertools
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulora_core.data.sources import Slice, load_records, pydoc_text
from modulora_core.data.text import load_text
from modulora_core.errors import DataError, MissingExtraError

ROWS = [
    {"prompt": f"question {i}", "completion": f'a "quoted", comma\'d\nanswer {i}'} for i in range(7)
]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


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


WRITERS = {
    "jsonl": lambda path: jsonl(path, ROWS),
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_kind_gives_the_same_records(tmp_path, suffix):
    records = load_records(WRITERS[suffix](tmp_path / f"data.{suffix}"))
    assert [dict(record.fields) for record in records] == ROWS


@pytest.mark.parametrize(
    ("suffix", "place"),
    [("jsonl", "line 3"), ("json", "line 10"), ("csv", "line 6"), ("parquet", "row 3")],
)
def test_a_record_knows_its_line(tmp_path, suffix, place):
    """The third record: in JSON its opening brace; in CSV after the header and two rows of two lines."""
    path = WRITERS[suffix](tmp_path / f"data.{suffix}")
    assert load_records(path)[2].place == f"{path}, {place}"


def test_json_lines_are_not_split_at_unicode_separators(tmp_path):
    path = write(
        tmp_path / "d.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n"
    )
    assert [record.fields["text"] for record in load_records(path)] == ["a\u2028b\x85c"]


def test_a_csv_cell_may_be_longer_than_the_csv_modules_limit(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path / "d.csv", "text\n" + "x" * (limit + 1) + "\n")
    assert len(load_records(path)[0].fields["text"]) == limit + 1
    assert csv.field_size_limit() == limit


def test_a_text_file_is_one_text_without_bom_and_with_unix_line_ends(tmp_path):
    path = write(tmp_path / "d.TXT", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert load_text(path) == "one\ntwo\n"


def test_several_sources_are_read_one_after_the_other(tmp_path):
    first, second = (
        write(tmp_path / "a.txt", "one"),
        jsonl(tmp_path / "b.jsonl", [{"text": "two"}, {"text": ""}]),
    )
    assert load_text([first, f"{second}[:50%]"]) == "one\n\ntwo"


MALFORMED = {
    "empty.txt": (b"", "line 1: expected text, got an empty file"),
    "blank.jsonl": (b" \n\n", "line 1: expected text, got an empty file"),
    "latin.txt": (b"ok\ncaf\xe9\n", "line 2: expected UTF-8, got byte 0xe9"),
    "cut.jsonl": (
        b'{"text": "a"}\n\n{"text": "b\n',
        "line 3: expected a JSON object, got Unterminated string",
    ),
    "list.jsonl": (b'{"text": "a"}\n["text"]\n', "line 2: expected a JSON object, got a list"),
    "cut.json": (b'[{"text": "a"},\n{"text": }]', "line 2: expected JSON, got Expecting value"),
    "lines.json": (
        b'{"text": "a"}\n{"text": "b"}\n',
        "line 2: expected JSON, got Extra data .* is a .jsonl file",
    ),
    "object.json": (b'{"text": "a"}', "line 1: expected a list of objects, got an object"),
    "number.json": (b'[{"text": "a"},\n\n3]', "line 3: expected a JSON object, got a number"),
    "none.json": (b"[]", "line 1: expected one or more records, got none"),
    "header.csv": (b"prompt,completion\n", "line 1: expected one or more records, got none"),
    "twice.csv": (b"text,text\na,b\n", "line 1: expected a header of distinct column names"),
    "short.csv": (
        b'prompt,completion\n"a\nb",c\n\nonly\n',
        "line 5: expected 2 columns .prompt, completion., got 1",
    ),
    "quote.csv": (
        b'text\nfine\n"open\n',
        "line 3: expected comma-separated values, got unexpected end",
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
        ("./folder/x", "x: expected a file, and there is none"),
        ("org/name/deep", "expected a file, and there is none"),
        ("imdb", "expected a file that exists, pydoc, or a Hub dataset as org/name"),
        ("pydoc[5:]", r"expected a slice in percent such as \[:90%\] .*, got \[5:\]"),
        ("pydoc[60%:40%]", r"slice \[60%:40%\]: expected 0% <= start < stop <= 100%"),
        ("pydoc[:101%]", "expected 0% <= start < stop <= 100%"),
        ([], "got nothing"),
        ("", "'': expected a file, .* got no possible name of one"),
        ("x" * 5000, "'x+': expected a file, .* got no possible name of one"),
        ("~nobody-of-this-name/d.txt", "got no possible name of one"),
    ],
)
def test_a_source_that_is_not_there_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_records(source)


def test_a_slice_without_records_is_refused(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", ROWS[:3])
    with pytest.raises(
        DataError, match=r"\[0%:10%\]: expected one or more records, and this slice of 3 has none"
    ):
        load_records(f"{path}[:10%]")


def test_a_file_whose_name_looks_like_a_slice_is_that_file(tmp_path):
    path = write(tmp_path / "d[1%:2%]", "x")
    with pytest.raises(
        DataError, match="expected a file that ends in one of"
    ):  # found, with a suffix that isn't ours
        load_records(path)


def test_a_local_file_wins_over_the_name_pydoc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pydoc", "x")
    with pytest.raises(DataError, match="expected a file that ends in one of"):
        load_records("pydoc")


@given(count=st.integers(1, 500), cuts=st.lists(st.integers(1, 99), unique=True, max_size=5))
def test_slices_that_meet_partition_the_records(count, cuts):
    edges = [0, *sorted(cuts), 100]
    ranges = [Slice(a, b).rows(count) for a, b in itertools.pairwise(edges)]
    assert [i for first, end in ranges for i in range(first, end)] == list(range(count))


@given(
    text=st.text(st.sampled_from("ab \n"), max_size=120),
    cuts=st.lists(st.integers(1, 99), unique=True, max_size=5),
)
def test_slices_that_meet_partition_the_text(text, cuts):
    edges = [0, *sorted(cuts), 100]
    assert "".join(Slice(a, b).of_text(text) for a, b in itertools.pairwise(edges)) == text


def test_pydoc_slices_partition_it_between_paragraphs_near_the_percentage():
    whole, head, tail = (load_text(f"pydoc{part}") for part in ("", "[:90%]", "[90%:]"))
    assert head + tail == whole == pydoc_text()
    assert head.endswith("\n\n")
    assert len(head) / len(whole) == pytest.approx(0.9, abs=0.005)
    assert len(whole) > 300_000


def test_a_text_of_few_paragraphs_keeps_them_whole():
    assert Slice(0, 90).of_text("one.\n\ntwo.\n\nthree.") == "one.\n\ntwo.\n\n"


def test_a_text_of_one_line_is_cut_between_words():
    text = "word " * 20
    assert Slice(0, 50).of_text(text) == "word " * 10


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A dataset under the name ``org/name``: the library reads such a folder as it reads the Hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    for split, labels in {"train": [0, 1, -1], "test": [1]}.items():
        rows = {"text": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        path = tmp_path / "org" / "name" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
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
    assert [r.fields["text"] for r in load_records("org/name:test")] == ["test 0"]
    assert [r.fields["text"] for r in load_records("org/name:default:test")] == ["test 0"]


def test_a_slice_of_a_hub_dataset_counts_records(hub_folder):
    assert [r.place for r in load_records("org/name[50%:]")] == ["org/name, row 3"]


def test_an_unknown_split_is_refused_by_name(hub_folder):
    expected = r"org/name:dev: expected a file in this folder, or a folder laid out as a dataset with the split 'dev'"
    with pytest.raises(DataError, match=expected):
        load_records("org/name:dev")


@pytest.mark.parametrize(("module", "name"), [("datasets", "org/name"), ("pyarrow", "d.parquet")])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    tmp_path, monkeypatch, module, name
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.parquet", "PAR1")
    monkeypatch.setitem(
        sys.modules, module, None
    )  # import raises ImportError, as for a missing library
    with pytest.raises(MissingExtraError, match=rf"{module}.*pip install 'modulora-core\[data\]'"):
        load_records(name)


def test_a_folder_is_told_from_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtraError,
        match="a folder; expected a file, or for a folder laid out as a dataset the library",
    ):
        load_records(tmp_path)
