"""Changed files of a packed folder and of an adapter are refused in one sentence, or they load.

Whatever a file holds, an error is an exception of this package, and its message is one line.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modulora_core.adapters.peft_format import read_adapter
from modulora_core.adapters.save_load import save_adapter
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.checkpoints.whole import check_whole
from modulora_core.errors import ModuLoRAError
from modulora_core.tests.adapted_models import trained

CASES = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,  # a run of CI must not depend on luck; remove it to search for more
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
    st.sampled_from([0, -1, 10**9, 10**12, 1e308, "../x", "\ud800", "a" * 5000, "nf4", "float8"]),
)  # fmt: skip
"""Values of other types and sizes than a file of ours has."""


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in parsed JSON."""
    items: Any = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    return [path] * bool(path) + [p for key, value in items for p in places(value, (*path, key))]


def edited(node: Any, place: tuple[Any, ...], value: Any, remove: bool) -> Any:
    """A copy of parsed JSON with another value at a place, or without it."""
    whole = copy.deepcopy(node)
    parent = whole
    for key in place[:-1]:
        parent = parent[key]
    if remove:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return whole


@pytest.fixture(scope="module")
def packed(
    pack: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "packed"
    return Path(shutil.copytree(pack("llama", "toy")[1], folder))


@pytest.fixture(scope="module")
def adapter(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(trained(load_model(packed)), folder)
    return folder


def check(read: Callable[[Path], object], folder: Path) -> None:
    message = ""
    try:
        read(folder)
    except ModuLoRAError as error:
        message = str(error)
    assert "\n" not in message


def read_packed(folder: Path) -> None:
    check_whole(open_checkpoint(folder))


@pytest.mark.slow
@CASES
@given(data=st.data())
def test_a_changed_config_is_refused_or_used(packed: Path, data: st.DataObject) -> None:
    _change_json(packed / "config.json", data, read_packed)


@pytest.mark.slow
@CASES
@given(data=st.data())
def test_a_changed_adapter_config_is_refused_or_used(adapter: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["adapter_config.json", "modulora.json"]))
    _change_json(adapter / name, data, read_adapter)


@pytest.mark.slow
@CASES
@given(data=st.data())
def test_changed_bytes_are_refused_or_read(
    packed: Path, adapter: Path, data: st.DataObject
) -> None:
    """The first bytes of a safetensors file are its header, which is changed the most."""
    file, read = data.draw(st.sampled_from([
        (packed / "model.safetensors", read_packed),
        (adapter / "adapter_model.safetensors", read_adapter),
    ]))  # fmt: skip
    content = file.read_bytes()
    changed = bytearray(content[: data.draw(st.integers(1, len(content)) | st.just(len(content)))])
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, min(3000, len(changed) - 1)))
        changed[at] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(bytes(changed))
        check(read, file.parent)
    finally:
        file.write_bytes(content)


def _change_json(file: Path, data: st.DataObject, read: Callable[[Path], object]) -> None:
    content = file.read_bytes()
    parsed = json.loads(content)
    place = data.draw(st.sampled_from(places(parsed)))
    text = json.dumps(edited(parsed, place, data.draw(VALUES), data.draw(st.booleans())))
    try:
        file.write_text(text)
        check(read, file.parent)
    finally:
        file.write_bytes(content)
