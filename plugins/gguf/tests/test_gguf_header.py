"""The header of a GGUF file: as the gguf package reads it, and damage is refused in one line."""

import shutil
import struct

import gguf
import pytest
from modulora_gguf.file.model_header import read_header, read_model_header
from modulora_gguf.file.writer import without_vocabulary
from modulora_gguf.formats import GGUFModel
from modulora_gguf.tests.tiny_gguf import ARCHITECTURES, write_tiny_gguf

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models import open_dense


def test_fields_and_places_are_those_of_the_gguf_package(tmp_path):
    path = write_tiny_gguf("lfm2", tmp_path / "tiny.gguf", "Q8_0")
    header, reader = read_header(path), gguf.GGUFReader(path)
    ours = {name: field.value for name, field in header.fields.items()}
    for name in ("tokens", "merges"):  # known by their length
        assert ours.pop(f"tokenizer.ggml.{name}") == len(
            reader.fields[f"tokenizer.ggml.{name}"].contents()
        )
    fields = {name: reader.fields[name].contents() for name in ours}
    assert ours == fields
    found = [(t.name, t.type, list(t.shape), t.offset, t.nbytes) for t in header.tensors]
    assert found == [
        (t.name, t.tensor_type.name, list(reversed(t.shape)), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    without_vocabulary(header, tmp_path / "light.gguf")
    light = gguf.GGUFReader(tmp_path / "light.gguf")
    assert [tensor.name for tensor in light.tensors] == [tensor.name for tensor in header.tensors]
    assert set(header.fields) - set(light.fields) == {
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "qwen3moe", "lfm2"])
def test_the_config_is_that_of_transformers(architecture, tmp_path):
    """We read it without the vocabulary, which takes transformers seconds."""
    from transformers import AutoConfig

    path = write_tiny_gguf(architecture, tmp_path / "tiny.gguf", "Q8_0")
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    ours = GGUFModel(path).config.to_dict()
    assert {**ours, "_name_or_path": ""} == {**config, "_name_or_path": ""}


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


LLAMA = string("general.architecture") + struct.pack("<I", 8) + string("llama")


def file_of(*, fields=LLAMA, count=1, tensors=(("a", (32, 2), 8, 0),), values=68):
    """A GGUF file; each tensor is its name, its dims as in the file, its type and its offset."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + fields
    for name, dims, kind, offset in tensors:
        header += string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        header += struct.pack("<IQ", kind, offset)
    return header + bytes(-len(header) % 32 + values)


def changed(start, new):
    return lambda data: data[:start] + new + data[start + len(new) :]


BYTE = string("x") + struct.pack("<IB", 0, 1)
ARRAY = string("x") + struct.pack("<I", 9)
DAMAGED = {
    "empty": (b"", "empty"),
    "another file": (b"PK\3\4" + bytes(100), "doesn't begin with GGUF"),
    "version": (changed(4, b"\7")(file_of()), "expected version 2 or 3, little-endian, got 7"),
    "big-endian": (changed(4, b"\0\0\0\3")(file_of()), "little-endian, got"),
    "truncated": (file_of(values=67), "a: expected 68 bytes from"),
    "cut off in the header": (file_of()[:80], "bytes at"),
    "many tensors": (changed(8, b"\xff" * 7)(file_of()), "tensors: .* more than the file holds"),
    "long name": (changed(24, b"\xff" * 7)(file_of()), "bytes at"),
    "not UTF-8": (changed(32, b"\xff")(file_of()), "expected UTF-8"),
    "a field twice": (file_of(fields=2 * BYTE, count=2), "twice"),
    "long array": (file_of(fields=ARRAY + struct.pack("<IQ", 4, 2**60)), "x: .* more than"),
    "alignment": (
        file_of(fields=string("general.alignment") + struct.pack("<II", 4, 24)),
        "general.alignment: expected a power of two, got 24",
    ),
    "no architecture": (
        file_of(fields=BYTE),
        "general.architecture: expected a string in the metadata, got none",
    ),
    "unknown type": (
        file_of(tensors=(("a", (32, 2), 77, 0),)),
        r"a: tensor type 77, which the installed gguf package [\d.]+ doesn't know; take the file",
    ),
    "no dims": (file_of(tensors=(("a", (), 8, 0),)), "expected 1 to 4 dims, got 0"),
    "no rows": (file_of(tensors=(("a", (32, 0), 8, 0),)), r"the shape \[0, 32\]"),
    "half a block": (file_of(tensors=(("a", (48, 2), 8, 0),)), "rows of blocks of 32 weights"),
    "misaligned": (file_of(tensors=(("a", (32, 1), 8, 8),)), "expected a multiple of 32, got 8"),
    "one name": (
        file_of(tensors=(("a", (32, 1), 8, 0), ("a", (32, 1), 8, 64)), values=128),
        "two tensors have one name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_in_one_sentence(case, tmp_path):
    data, message = DAMAGED[case]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises((CheckpointError, ModelError), match=message) as caught:
        read_model_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_model_are_refused(tmp_path):
    path = tmp_path / "other.gguf"
    adapter = LLAMA + string("general.type") + struct.pack("<I", 8) + string("adapter")
    path.write_bytes(file_of(fields=adapter, count=2))
    with pytest.raises(ModelError, match="expected a model in this GGUF file, got type adapter"):
        read_model_header(path)
    path.write_bytes(file_of(tensors=()))
    with pytest.raises(ModelError, match="expected a model in this GGUF file, got no tensors"):
        read_model_header(path)
    path.write_bytes(file_of(tensors=(("a", (16,), 26, 0),)))
    with pytest.raises(ModelError, match="a: expected floats or blocks of weights, got type I32"):
        read_model_header(path)


def test_a_split_model_is_read_from_its_first_part(tmp_path):
    whole = read_header(write_tiny_gguf("llama", tmp_path / "whole.gguf"))
    first = write_tiny_gguf("llama", tmp_path / "tiny.gguf", split=9)
    found, second = read_header(first), tmp_path / "tiny-00002-of-00004.gguf"
    assert [one.name for one in found.tensors] == [one.name for one in whole.tensors]
    assert len({one.path for one in found.tensors}) == 3
    with pytest.raises(
        CheckpointError, match=r"00002-of-00004.gguf: expected the first of 4 parts"
    ):
        read_header(second)
    shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(
        CheckpointError, match=r"first of 4 parts, NAME-00001-of-00004.gguf, got part 1"
    ):
        read_header(tmp_path / "renamed.gguf")
    shutil.copy(tmp_path / "tiny-00003-of-00004.gguf", second)
    with pytest.raises(
        CheckpointError, match=r"00002-of-00004.gguf: expected part 2 of 4, got another"
    ):
        read_header(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"got no tiny-00002-of-00004.gguf; download it too"):
        read_header(first)


def test_biases_of_a_llama_are_read(tmp_path, monkeypatch):
    """Transformers leaves them out without a word."""
    fields, top, layer = ARCHITECTURES["llama"]
    rows = {name: layer[f"attn_{name}.weight"][0] for name in ("q", "k", "v", "output")}
    biases = {f"attn_{name}.bias": (count,) for name, count in rows.items()}
    monkeypatch.setitem(ARCHITECTURES, "llama", (fields, top, {**layer, **biases}))
    source = open_dense(str(write_tiny_gguf("llama", tmp_path / "tiny.gguf", "Q8_0")))
    source.check_whole()
    assert not source.unplaced
    assert "model.layers.1.self_attn.o_proj.bias" in source.parameters


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_count", 2.5, "block_count: expected a number of layers from 1 to .*, got 2.5"),
        ("block_count", 2**31 - 1, "block_count: expected a number of layers from 1 to .* 21, got"),
        ("attention.head_count", [4, 4], "transformers can't read this GGUF file"),
        ("embedding_length", 0, "expected positive sizes in its config|zero-element tensors"),
        ("vocab_size", 2**31 - 1, r"expected 68719476704 values for shape .*, got 2048"),
        ("rope.freq_base", float("nan"), "rope.freq_base: expected a finite number, got nan"),
    ],
)
def test_metadata_that_makes_no_model_is_refused(name, value, message, tmp_path, monkeypatch):
    fields, top, layer = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "llama", ({**fields, name: value}, top, layer))
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf", "Q8_0")
    with pytest.raises((CheckpointError, ModelError), match=message):
        open_dense(str(path))
