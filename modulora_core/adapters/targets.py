"""Which layers a name means, by PEFT's rule: those whose dotted path is the name, or ends with ``.name``."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

from modulora_core.errors import AdapterError

ALL_LINEAR = "all-linear"
"""The target that means every packed linear layer."""


def matches(path: str, name: str) -> bool:
    """Whether ``name`` means the module at ``path``."""
    return path == name or path.endswith(f".{name}")


def select_targets(
    packed: Collection[str], targets: str | Sequence[str], modules: Iterable[str] = ()
) -> list[str]:
    """Those of the layers ``packed`` that ``targets`` choose, in their order.

    Args:
        packed: paths of the packed linear layers.
        targets: a name or several, or ``"all-linear"``.
        modules: paths of all of the model's modules, to say of a target that it is another one.

    Raises:
        AdapterError: a target is none of ``packed``; the message has near misses.
    """
    names = [targets] if isinstance(targets, str) else targets
    if ALL_LINEAR in names:
        return list(packed)
    for name in names:
        if not any(matches(path, name) for path in packed):
            raise AdapterError(_unknown(name, packed, modules))
    return [path for path in packed if any(matches(path, name) for name in names)]


def _unknown(target: str, packed: Collection[str], modules: Iterable[str]) -> str:
    other = next((path for path in modules if matches(path, target)), None)
    if other is not None:
        return (
            f"target {target!r}: {other} is no packed linear layer, and only those take an adapter"
        )
    names = sorted({path.rpartition(".")[2] for path in packed})
    near = difflib.get_close_matches(target, [*names, *packed], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"target {target!r}: no packed layer of that name{hint} (expected {', '.join(names)}, a path, or "
        f"{ALL_LINEAR})"
    )


def shortest_names(paths: Collection[str], modules: Iterable[str]) -> list[str]:
    """Names that mean exactly ``paths`` of all ``modules``: the paths' last parts, or else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path in modules if any(matches(path, name) for name in names)}
    return names if meant == set(paths) else sorted(paths)
