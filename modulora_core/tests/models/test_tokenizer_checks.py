"""A tokenizer.json that would end the process, or panic in Rust, is refused in one sentence."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulora_core.data.rendering import token_ids
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import ModelError
from modulora_core.models import tokenizer_checks
from modulora_core.models.tokenizer import load_tokenizer
from modulora_core.tests.fuzzing import cases
from modulora_core.tests.tiny_tokenizer import make_tokenizer

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEMPLATE = [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def saved(folder: Path, **parts: Any) -> Path:
    """A folder with a small tokenizer of which some parts are others."""
    make_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return folder


DOUBLING = [replace("a", "aa")] * 40
REFUSED_AT_LOAD = {
    "a normalizer that grows": {"normalizer": {"type": "Sequence", "normalizers": DOUBLING}},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": DOUBLING}]}},
    "an empty pattern": {"normalizer": replace("", "a" * 100)},
    "a regular expression": {"normalizer": replace("", "a" * 100, "Regex")},
    "a decoder that grows": {"decoder": {"type": "Sequence", "decoders": DOUBLING}},
    "a charsmap of 4 GiB": {"normalizer": charsmap(b"\xfc\xff\xff\xff" + b"abcd")},
    "a charsmap of no size": {"normalizer": charsmap(b"ab")},
    "no charsmap": {"normalizer": charsmap(b"")},
}  # fmt: skip
REFUSED_AT_ENCODING = {
    "a charsmap without its trie": {"normalizer": charsmap(b"\4\0\0\0abcdxx")},
    "backtracking": {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}},
    "an unknown token": {"post_processor": {
        "type": "TemplateProcessing", "single": TEMPLATE, "pair": TEMPLATE, "special_tokens": {}}},
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}  # fmt: skip


@pytest.mark.parametrize("parts", REFUSED_AT_LOAD.values(), ids=REFUSED_AT_LOAD)
def test_it_is_refused_when_it_is_loaded(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected|fails") as found:
        load_tokenizer("it", saved(tmp_path, **parts))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("parts", REFUSED_AT_ENCODING.values(), ids=REFUSED_AT_ENCODING)
def test_it_is_refused_when_it_encodes(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokeniz\w+.*take another tokenizer|no tokenizer that"):
        token_ids(
            load_tokenizer("it", saved(tmp_path, **parts)), ["a" * 40 + "b"],
            add_special_tokens=True,
        )  # fmt: skip


def test_ordinary_normalizers_are_read(tmp_path: Path) -> None:
    steps = [replace(" ", "▁"), replace(" {2,}", "▁", "Regex"), {"type": "Prepend", "prepend": "▁"},
             {"type": "NFKC"}]  # fmt: skip
    folder = saved(tmp_path, normalizer={"type": "Sequence", "normalizers": steps})
    assert token_ids(load_tokenizer("it", folder), ["a b"])


STEPS = st.recursive(
    st.builds(
        replace, st.text(max_size=2), st.text(max_size=40), st.sampled_from(["String", "Regex"])
    )
    | st.builds(charsmap, st.binary(max_size=60)),
    lambda inner: st.builds(
        lambda steps: {"type": "Sequence", "normalizers": steps}, st.lists(inner, max_size=4)
    ),
    max_leaves=6,
)
CHILD = """
import resource, sys, pathlib
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
from modulora_core.data.rendering import token_ids
from modulora_core.errors import ModuLoRAError
from modulora_core.models.tokenizer import load_tokenizer
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        token_ids(load_tokenizer("it", folder), ["a" * 40 + "b c", "Zürich"])
    except ModuLoRAError:
        pass
print("whole")
"""


@pytest.mark.slow
@cases(2)
@given(steps=st.lists(STEPS, min_size=20, max_size=20))
def test_no_normalizer_ends_the_process(steps: list[Any], tmp_path: Path) -> None:
    """A process with a limit of memory reads 20 of them, twice."""
    for number, step in enumerate(steps):
        saved(tmp_path / str(number), normalizer=step)
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "whole", done.stderr[-2000:]


def sentencepiece_folder(folder: Path, change: Callable[[Any], None] | None = None) -> Path:
    """A folder with the SentencePiece model of T5's tokenizer, and no tokenizer.json."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    pytest.importorskip("google.protobuf")
    from transformers.convert_slow_tokenizer import import_protobuf

    (folder / "text.txt").write_text(pydoc_text()[:40_000])
    trainer.train(input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"),
                  vocab_size=300, minloglevel=2)  # fmt: skip
    file = folder / "spiece.model"
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    if change is not None:
        change(proto)
    file.write_bytes(proto.SerializeToString())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return folder


def long_piece(proto: Any) -> None:
    proto.pieces[200].piece = "a" * 3_000_000


def wrong_charsmap(proto: Any) -> None:
    proto.normalizer_spec.precompiled_charsmap = b"\4\0\0\0\xff\xff\xff\xff"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [(long_piece, "ends the process"), (wrong_charsmap, "out of bounds|charsmap")],
)
def test_a_crafted_sentencepiece_model_is_refused(
    tmp_path: Path, change: Callable[[Any], None], reason: str
) -> None:
    folder = sentencepiece_folder(tmp_path, change)
    with pytest.raises(ModelError, match=f"spiece.model: expected a tokenizer .*({reason})"):
        load_tokenizer("it", folder)


@pytest.mark.slow
def test_a_sound_sentencepiece_model_is_read(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("it", sentencepiece_folder(tmp_path))
    assert tokenizer.decode(token_ids(tokenizer, ["the name"])[0]) == "the name"


def test_a_sentencepiece_model_is_loaded_within_limits_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05\n\x03<s>")
    monkeypatch.setattr(tokenizer_checks, "_SCRIPT", str(tmp_path / "worker.py"))
    (tmp_path / "worker.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ModelError, match=r"tokenizer\.model: expected a tokenizer .* ends the"):
        load_tokenizer("it", tmp_path)
