"""Strategies that change files, and the rule of all readers: read it, or refuse it in one line.

CI draws the same cases in each run. Other ones: ``pytest --hypothesis-profile search``.
"""

import copy
import json
import signal
from contextlib import contextmanager

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import RequestError
from modulora_core.hf.load_model import load_model

LONGEST = 300
"""Seconds of a case on a busy machine, which may compile kernels. A longer one is a hang."""

_HEADER = 3000
"""Bytes at a file's beginning that readers parse, about."""

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.none()),
    st.sampled_from([0, -1, 10**9, 10**12, 1e308, "../x", "\ud800", "a" * 5000, "nf4", "float8"]),
)  # fmt: skip
"""JSON of other types and sizes than a file of ours has."""


def cases(count):
    """Settings of a fuzz test with so many cases, which may use fixtures."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, suppress_health_check=checks)


def read_or_refused(read):
    """Call a reader. Its value, or None if it refuses the file as a wrong request, in one line."""
    with _within(LONGEST):
        try:
            value = read()
            event("read")
            return value
        except RequestError as error:
            message = str(error)
    event("refused")
    assert message
    assert "\n" not in message
    return None


def run_once(model):
    """Check a packed model as every command does; load it and run it once."""
    checkpoint = open_packed(model)
    checkpoint.check_whole()
    with torch.no_grad():
        load_model(checkpoint)(torch.arange(3, 11)[None])


def refused_or_runs(folder, count=60):
    """Change a folder of a packed model so many times. It is refused in one line, or runs."""
    run_once(folder)

    @cases(count)
    @given(data=st.data())
    def check(data):
        read_changed(folder, ["config.json", "*.safetensors"], data, lambda: run_once(folder))

    check()


def read_changed(folder, patterns, data, read):
    """Change a file of one of the patterns, and read the folder; then put the file back."""
    file = data.draw(st.sampled_from(sorted(folder.glob(data.draw(st.sampled_from(patterns))))))
    content = file.read_bytes()
    change = changed_json if file.suffix == ".json" else changed_bytes
    try:
        file.write_bytes(change(data, content))
        read_or_refused(read)
    finally:
        file.write_bytes(content)


@contextmanager
def _within(seconds):
    def late(number, frame):
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def changed_json(data, content):
    """JSON with another value at one place, or without it."""
    parsed = json.loads(content)
    place = data.draw(st.sampled_from(places(parsed)))
    return json.dumps(edited(parsed, place, data.draw(st.just(...) | VALUES))).encode()


def changed_bytes(data, content):
    """A file cut short, or with up to three other bytes: anywhere, or near its beginning."""
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    changed = bytearray(content[:length])
    last = min(data.draw(st.sampled_from([_HEADER, length])), length) - 1
    for _ in range(data.draw(st.integers(0, 3)) if changed else 0):
        changed[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    return bytes(changed)


def places(node, path=()):
    """The path of every value in parsed JSON."""
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    return [path] * bool(path) + [p for key, value in items for p in places(value, (*path, key))]


def edited(node, place, value):
    """A copy of parsed JSON with another value at a place; ``...`` removes it."""
    whole = copy.deepcopy(node)
    parent = whole
    for key in place[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return whole
