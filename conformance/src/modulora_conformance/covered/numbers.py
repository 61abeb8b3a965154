"""Finds the numbers that a plugin's source names: where it may switch from one way to another."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache

from modulora_conformance.covered.source import classes_of, modules_of, reached
from modulora_core.spec import Quantizer

BOUNDS = {"range", "min", "max", "clamp", "split", "chunk", "narrow", "arange"}
"""Functions whose arguments are sizes."""


CONSTANT = (
    ast.Constant, ast.Name, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop,
    ast.expr_context,
)  # fmt: skip
"""The parts of an expression that may be evaluated."""


def numbers_of(quantizer: Quantizer) -> list[int]:
    """Each number from 3 on in a comparison, a slice, a bound, a ``//`` or a ``%``; constants of
    modules; values of options. In ascending order."""
    own = quantizer.options.model_dump().values()
    promised = (v for promise in quantizer.spec.promises for v in promise.options.values())
    options = {abs(v) for v in (*own, *promised) if isinstance(v, int)}
    return sorted(n for n in options | _in_source(type(quantizer)) if n > 2)


@cache
def _in_source(cls: type[Quantizer]) -> set[int]:
    classes = classes_of(cls)
    packages = dict.fromkeys(c.__module__.partition(".")[0] for c in classes)
    modules = [module for name in packages for module in modules_of(name)]
    found = set[int]()
    for module, statements in reached(modules, classes).items():
        values = vars(sys.modules[module.name]) if module.name in sys.modules else {}
        for statement in statements:
            for node in ast.walk(statement):
                found |= {n for each in _sizes(node) for n in _values(each, values)}
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                found |= set(_values(statement.value, values))
    return {abs(n) for n in found}


def _sizes(node: ast.AST) -> Iterable[ast.expr]:
    if isinstance(node, ast.Compare):
        return (node.left, *node.comparators)
    if isinstance(node, ast.Slice):
        return (each for each in (node.lower, node.upper, node.step) if each is not None)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod):
        return (node.right,)
    if isinstance(node, ast.Call):
        called = getattr(node.func, "id", getattr(node.func, "attr", ""))
        return node.args if called in BOUNDS else ()
    return (node.pattern.value,) if _is_case(node) else ()  # type: ignore[attr-defined]


def _is_case(node: ast.AST) -> bool:
    return isinstance(node, ast.match_case) and isinstance(node.pattern, ast.MatchValue)


def _values(node: ast.expr, names: dict[str, object]) -> Iterator[int]:
    """The integers that an expression of constants is, or has inside. Nothing is called."""
    value: object = None
    if all(isinstance(part, CONSTANT) for part in ast.walk(node)):
        with suppress(Exception):  # a variable, or a division by zero
            value = eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}}, names)
    if value is None:
        value = list[object]()
        value += [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
        value += [names.get(n.id) for n in ast.walk(node) if isinstance(n, ast.Name)]
    for each in value if isinstance(value, list | tuple | set | frozenset) else [value]:
        if isinstance(each, int | float) and abs(each) < 2**40 and each == each // 1:
            yield int(each)
