"""Choose the layers that get an adapter: by a group, or by PEFT's rule for names.

    all-linear   every packed linear layer except the output head, and every stack of experts
    attention    the linear layers of attention: a part of their path has "attn" or "attention"
    experts      the fused experts of a mixture, but no shared expert
    name         each layer or stack whose dotted path is the name or ends with ``.name``

Of a multimodal model a group has layers of the text decoder alone, and a warning names the others;
a name selects any layer. Of a base model alone, such as CLIP, a group has layers of all parts.
A group never has a router or another gate of a mixture: that would move tokens to other experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

from modulora_core.errors import AdapterError, OptionError

ALL_LINEAR, ATTENTION, EXPERTS = "all-linear", "attention", "experts"


def select_layers(
    shapes: Mapping[str, tuple[int, ...]],
    targets: str | Sequence[str],
    rank: int,
    modules: Iterable[str],
    head: str | None = None,
    decoder: str = "",
    tied: str | None = None,
) -> list[str]:
    """Select layers by name, in the order of ``shapes``.

    Args:
        shapes: ``(out, in)`` of each packed linear layer, ``(experts, out, in)`` of a stack, by
            path.
        targets: one name or group, or several.
        rank: r of the adapter.
        modules: paths of all modules of the model, for a better message.
        head: path of the output head, which only its own name selects.
        decoder: beginning of the paths of a multimodal model's text decoder.
        tied: path of an output head that is the embedding's packed table, for a better message.

    Raises:
        AdapterError: a target selects no packed layer; the message has near misses.
        OptionError: r is larger than min(in, out) of every selected layer.
    """
    names = [targets] if isinstance(targets, str) else targets
    chosen: set[str] = set()
    text = {path: shape for path, shape in shapes.items() if path.startswith(decoder)}
    for name in names:
        group = _group(name, text, head)
        found = [path for path in shapes if _selects(name, path)] if group is None else group
        if not found:
            raise AdapterError(_unknown(name, shapes, modules, tied))
        chosen.update(found)
    paths = [path for path in shapes if path in chosen]
    largest = max(paths, key=lambda path: min(shapes[path][-2:]), default=None)
    if largest is not None and rank > min(shapes[largest][-2:]):
        raise OptionError(
            f"rank {rank}: expected at most {min(shapes[largest][-2:])}, the highest rank that the "
            f"update of an adapted layer can have (the largest layer, {largest}, is "
            f"{list(shapes[largest])}); lower the rank"
        )
    return paths


def shortest_names(paths: Collection[str], modules: Iterable[str], *, parts: int = 1) -> list[str]:
    """Names that select exactly ``paths`` among ``modules``: last parts, or else whole paths."""
    names = sorted({".".join(path.split(".")[-parts:]) for path in paths})
    selected = {path for path in modules if any(_selects(name, path) for name in names)}
    return names if selected == set(paths) else sorted(paths)


def _group(name: str, shapes: Mapping[str, tuple[int, ...]], head: str | None) -> list[str] | None:
    """The layers of a group; None for another name."""
    experts = [path for path, shape in shapes.items() if len(shape) == 3]
    routers = {"router", "gate", "shared_expert_gate"} if experts else set[str]()
    linear = [path for path in shapes if path not in experts and not routers & {*path.split(".")}]
    if name == ALL_LINEAR:
        return [path for path in (*linear, *experts) if path != head]
    if name == EXPERTS:
        return experts
    if name == ATTENTION:
        words = ("attn", "attention")
        return [path for path in linear if any(word in path.lower() for word in words)]
    return None


def _selects(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _unknown(target: str, packed: Collection[str], modules: Iterable[str], tied: str | None) -> str:
    kinds = {
        ALL_LINEAR: "linear layer besides the output head",
        ATTENTION: "linear layer of attention",
        EXPERTS: "stack of fused experts",
    }
    if target in kinds:
        return f"target {target!r}: expected a packed {kinds[target]} in the model, found none"
    other = next((path for path in modules if _selects(target, path)), None)
    if other is not None:
        what = "the embedding's table, which an adapter would change" if other == tied else "none"
        return f"target {target!r}: expected a packed linear layer, and {other} is {what}"
    names = sorted({path.rpartition(".")[2] for path in packed})
    groups = [ALL_LINEAR, ATTENTION, EXPERTS]
    near = difflib.get_close_matches(target, [*names, *groups, *packed], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"target {target!r}: no packed layer has that name{hint} "
        f"(expected {', '.join(names)}, a path, {ATTENTION}, {EXPERTS} or {ALL_LINEAR})"
    )
