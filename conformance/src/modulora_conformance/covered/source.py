"""Reads a plugin's source: what its quantizer reaches, and the parts of a line that may not run.

coverage.py sees lines. The parts of ``a if c else b``, ``c and a`` and ``lambda: a`` share one, so
:func:`expanded` gives a copy of the source in which each of these parts begins a line.
"""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modulora_core.spec import Quantizer

OURS = ("modulora_core", "modulora_kernels", "modulora_conformance")
"""Packages whose own tests hold their branches."""

DYNAMIC = {"globals", "eval", "exec", "import_module", "__import__", "modules"}
"""Names of what finds a function by a computed name: then all of the package counts as reached."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
Comprehension = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


@dataclass(frozen=True)
class Part:
    """A part of an expression that runs only under a condition.

    Attributes:
        line: in the file.
        copied: its lines in the copy, which no other code has.
    """

    line: int
    copied: range
    text: str


class Module:
    """A file of a plugin's package.

    Attributes:
        name: ``"package.module"``.
        copy: the text with a line for each part.
        origin: for each line of the copy, from 1 on, the line of the file.
        parts: that may not run, by the line of the file.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        source = path.read_text(encoding="utf-8")
        self.lines = source.split("\n")  # as ast counts them
        self.tree = ast.parse(source)
        self.copy, self.origin, self.parts = expanded(source, self.tree)
        functions = [n for n in ast.walk(self.tree) if isinstance(n, Function)]
        self.functions = {n: self._qualified(n) for n in functions}
        self.aliases = dict(self._imported())

    def _imported(self) -> Iterator[tuple[str, str]]:
        """A name in this file, and what it may mean: the name of a module."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for each in node.names:
                    yield each.asname or each.name, f"{_absolute(self, node)}.{each.name}"
            elif isinstance(node, ast.Import):
                yield from ((each.asname or each.name, each.name) for each in node.names)

    def _qualified(self, function: Function) -> str:
        """``"Class.method"``: the definitions around a function, by their lines."""
        named = [n for n in ast.walk(self.tree) if isinstance(n, Definition)]
        around = [n for n in named if _holds(n, function)]
        return ".".join(n.name for n in sorted(around, key=lambda n: n.lineno))

    def function_at(self, line: int) -> Function | None:
        """The innermost function whose body has a line."""
        found = [f for f in self.functions if f.body[0].lineno <= line <= (f.end_lineno or line)]
        return max(found, key=lambda f: f.lineno, default=None)

    def text(self, line: int) -> str:
        return self.lines[line - 1].strip()


def _holds(outer: ast.stmt, inner: ast.stmt) -> bool:
    return outer.lineno <= inner.lineno and (inner.end_lineno or 0) <= (outer.end_lineno or 0)


def modules_of(package: str) -> list[Module]:
    """Every file of a package, or the one file of a module."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    file = Path(spec.origin)
    if file.name != "__init__.py":
        return [Module(package, file)]
    found = []
    for path in sorted(file.parent.rglob("*.py")):
        parts = path.relative_to(file.parent.parent).with_suffix("").parts
        found.append(Module(".".join(p for p in parts if p != "__init__"), path))
    return found


def classes_of(cls: type[Quantizer]) -> list[type]:
    """A quantizer's class, and the classes that it derives from outside the core and toolkit."""
    others = (*OURS, "builtins", "abc", "typing", "pydantic")
    return [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in others]


def reached(modules: list[Module], classes: list[type]) -> dict[Module, list[ast.stmt]]:
    """The statements of each module that the classes reach, by the names that they use.

    A class reaches all of its methods. A string that is a module's name reaches all of the module,
    as does a module that is used whole (``vars(module)``); a function that is found by a computed
    name (:data:`DYNAMIC`) may be any of the package.
    """
    named = {module.name: module for module in modules}
    everything = [(module, each) for module in modules for each in _statements(module.tree.body)]
    defined: dict[tuple[str, str], list[tuple[Module, ast.stmt]]] = defaultdict(list)
    for module, statement in everything:
        for name in _defines(statement):
            defined[module.name, name].append((module, statement))

    def whole(name: str) -> list[tuple[Module, ast.stmt]]:
        return [d for d in everything if f"{d[0].name}.".startswith(f"{name}.")]

    def used(module: Module, statement: ast.stmt) -> Iterator[tuple[Module, ast.stmt]]:
        if isinstance(statement, ast.ImportFrom):
            for each in statement.names:
                of = _absolute(module, statement)
                yield from whole(of) if each.name == "*" else defined.get((of, each.name), ())
            return
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                yield from defined.get((module.name, node.id), ())
                if node.id in DYNAMIC:
                    yield from everything
            elif isinstance(node, ast.Attribute):
                of = module.aliases.get(ast.unparse(node.value), "")
                yield from defined.get((of, node.attr), ())
                if node.attr in DYNAMIC:
                    yield from everything
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from defined.get((module.name, node.value), ())
                if "." in node.value and f"{node.value}." in prefixes:
                    yield from whole(node.value)
            for child in ast.iter_child_nodes(node):
                if not isinstance(node, ast.Attribute) or node.attr == "__dict__":
                    of = module.aliases.get(getattr(child, "id", ""), "")
                    yield from whole(of) if of in named else ()

    prefixes = {f"{m.name[:n]}." for m in modules for n in _ends(m.name)}
    own = {(cls.__module__, cls.__name__) for cls in classes}
    asked = [d for place in own for d in defined.get(place, ())]
    asked += [(m, s) for m, s in everything if isinstance(s, ast.Expr)]  # runs with the import
    found: dict[ast.stmt, Module] = {}
    while asked:
        module, statement = asked.pop()
        if statement not in found:
            found[statement] = module
            asked += used(module, statement)
    return {m: [s for s, of in found.items() if of is m] for m in dict.fromkeys(found.values())}


def _ends(name: str) -> Iterator[int]:
    """Where a module's name may end: at each dot, and at its own end."""
    yield from (n for n, letter in enumerate(name) if letter == ".")
    yield len(name)


def _absolute(module: Module, statement: ast.ImportFrom) -> str:
    """The module that a statement imports from."""
    if not statement.level:
        return statement.module or ""
    folders = module.name.split(".")
    if module.path.name != "__init__.py":
        folders = folders[:-1]
    folders = folders[: len(folders) - statement.level + 1]
    return ".".join([*folders, *filter(None, [statement.module])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements at the top of a module; those in its ``if``, ``try`` and ``with`` too."""
    for statement in body:
        inner = [getattr(statement, n, []) for n in ("body", "orelse", "finalbody", "handlers")]
        if isinstance(statement, (ast.If, ast.Try, ast.With, ast.For, ast.ExceptHandler)):
            for block in inner:
                yield from _statements(block)
        else:
            yield statement


def _defines(statement: ast.stmt) -> set[str]:
    if isinstance(statement, Definition):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {each.asname or each.name.partition(".")[0] for each in statement.names}
    stored = (n for n in ast.walk(statement) if isinstance(n, ast.Name))
    return {n.id for n in stored if isinstance(n.ctx, ast.Store)}


def expanded(source: str, tree: ast.Module) -> tuple[str, list[int], list[Part]]:
    """A copy in which each part that may not run begins a line, its lines' origins, the parts."""
    marks: dict[int, list[tuple[int, tuple[int, int, int], ast.expr]]] = defaultdict(list)
    for node in _parts(tree):  # an offset counts bytes
        first, last = (node.lineno, node.col_offset), _end(node)
        # of two that begin together the longer one opens first; and it closes last
        marks[first[0]].append((first[1], (0, -last[0], -last[1]), node))
        marks[last[0]].append((last[1], (1, -first[0], -first[1]), node))
    pieces, origin, began, parts = list[bytes](), [0], dict[ast.expr, int](), list[Part]()
    for number, text in enumerate(source.split("\n"), 1):
        origin.append(number)
        line, done = text.encode(), 0
        for column, order, node in sorted(marks[number], key=lambda mark: mark[:2]):
            pieces += [line[done:column], b"\n)" if order[0] else b"(\n"]
            done = column
            origin.append(number)
            if order[0]:
                copied = range(began[node], len(origin) - 1)
                parts.append(Part(node.lineno, copied, " ".join(ast.unparse(node).split())))
            else:
                began[node] = len(origin) - 1
        pieces += [line[done:], b"\n"]
    return b"".join(pieces[:-1]).decode(), origin, parts


def _end(node: ast.expr) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


def _parts(node: ast.AST, inside: bool = False) -> Iterator[ast.expr]:
    """The expressions in functions that run only under a condition; not the words of an error."""
    if isinstance(node, (ast.JoinedStr, ast.Raise)):
        return
    if isinstance(node, ast.Lambda):
        yield node.body
    elif inside and isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif inside and isinstance(node, ast.BoolOp):
        yield from node.values[1:]
    elif inside and isinstance(node, Comprehension) and any(g.ifs for g in node.generators):
        yield node.key if isinstance(node, ast.DictComp) else node.elt
    inside = inside or isinstance(node, Function | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _parts(child, inside)
