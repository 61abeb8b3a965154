"""Choose the layers that get an adapter, by PEFT's rule for names.

A name selects each layer whose dotted path is the name or ends with ``.name``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

from modulora_core.errors import AdapterError, OptionError

ALL_LINEAR = "all-linear"
"""The target that selects every packed linear layer except the output head."""


def select_layers(
    shapes: Mapping[str, tuple[int, int]],
    targets: str | Sequence[str],
    rank: int,
    modules: Iterable[str],
    head: str | None = None,
) -> list[str]:
    """Select layers by name, in the order of ``shapes``.

    Args:
        shapes: ``(out, in)`` of each packed linear layer, by path.
        targets: one name or several, or ``"all-linear"``.
        rank: r of the adapter.
        modules: paths of all modules of the model, for a better message.
        head: path of the output head, which only its own name selects.

    Raises:
        AdapterError: a target selects no packed layer; the message has near misses.
        OptionError: r is larger than min(in, out) of every selected layer.
    """
    names = [targets] if isinstance(targets, str) else targets
    if ALL_LINEAR in names:
        paths = [path for path in shapes if path != head]
    else:
        for name in names:
            if not any(_selects(name, path) for path in shapes):
                raise AdapterError(_unknown(name, shapes, modules))
        paths = [path for path in shapes if any(_selects(name, path) for name in names)]
    largest = max(paths, key=lambda path: min(shapes[path]), default=None)
    if largest is not None and rank > min(shapes[largest]):
        raise OptionError(
            f"rank {rank}: expected at most {min(shapes[largest])}, the highest rank that the "
            f"update of an adapted layer can have (the largest layer, {largest}, is "
            f"{list(shapes[largest])}); lower the rank"
        )
    return paths


def shortest_names(paths: Collection[str], modules: Iterable[str]) -> list[str]:
    """Names that select exactly ``paths`` among ``modules``: last parts, or else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    selected = {path for path in modules if any(_selects(name, path) for name in names)}
    return names if selected == set(paths) else sorted(paths)


def _selects(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _unknown(target: str, packed: Collection[str], modules: Iterable[str]) -> str:
    other = next((path for path in modules if _selects(target, path)), None)
    if other is not None:
        return f"target {target!r}: expected a packed linear layer, and {other} is none"
    names = sorted({path.rpartition(".")[2] for path in packed})
    near = difflib.get_close_matches(target, [*names, *packed], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"target {target!r}: no packed layer has that name{hint} "
        f"(expected {', '.join(names)}, a path, or {ALL_LINEAR})"
    )
