"""Find why a plugin's class could not be imported, without importing it, and so without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modulora_core.registry import Entry
    from modulora_core.spec import QuantizerSpec

_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][\w.-]*)")


def fault(entry: Entry[QuantizerSpec]) -> str | None:
    """Why the class of a quantizer cannot be imported, in a sentence, or None.

    It finds a requirement that is not installed, a location without a module or a class, and a
    module that its file imports and nobody has. Code is read, and not run.
    """
    if entry.spec is None:
        return None
    missing = [name for name in _requirements(entry.distribution) if not _is_installed(name)]
    if missing:
        return f"needs {' and '.join(missing)}, which isn't installed: pip install " + " ".join(
            missing
        )
    name, class_name = entry.spec.location.split(":")
    spec = _found(name)
    if spec is None:
        return (
            f"expected its class at {entry.spec.location}, got no module {name}; correct location "
            "in its spec"
        )
    source = _parsed(spec)
    if source is None:
        return None
    names = set(_defined(source))
    if class_name not in names and "*" not in names:
        return (
            f"expected its class at {entry.spec.location}, got a module without {class_name}; "
            "correct location in its spec"
        )
    return _missing_import(source, name, {name})


def _requirements(distribution: str) -> Iterator[str]:
    """Names of the packages that a distribution needs on each machine; none if it is unknown."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return
    for line in lines:
        found = _REQUIREMENT.match(line)
        if found and ";" not in line:  # an extra, or another platform
            yield found[1]


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _found(module: str) -> ModuleSpec | None:
    """The spec of a module. Its packages are not imported, as ``find_spec`` would."""
    path, spec = None, None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
        if spec is None:
            return _built_in(module) if i == 0 else None
        path = spec.submodule_search_locations
        if path is None and i + 1 < len(parts):
            return None
    return spec


def _built_in(module: str) -> ModuleSpec | None:
    """A module of the interpreter, or of a finder of editable packages."""
    import importlib.util

    try:
        return importlib.util.find_spec(module.partition(".")[0]) and importlib.util.find_spec(
            module
        )
    except (ImportError, ValueError):
        return None


def _parsed(spec: ModuleSpec) -> ast.Module | None:
    """The module's code, or None if it is no Python file; importing then reports the fault."""
    try:
        return ast.parse(Path(str(spec.origin)).read_text("utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _defined(source: ast.Module) -> Iterator[str]:
    """The names that a module's own lines define or import."""
    for node in ast.walk(source):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _missing_import(source: ast.Module, module: str, seen: set[str]) -> str | None:
    """The first module that the unconditional imports of a file, or of its package, lack."""
    package = module.partition(".")[0]
    for node in source.body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            root = name.partition(".")[0]
            if root != package:
                if _found(root) is None:
                    return f"imports {root}, which isn't installed: install the package that has it"
                continue
            spec = None if name in seen else _found(name)
            seen.add(name)
            inner = spec and _parsed(spec)
            if inner and (reason := _missing_import(inner, name, seen)):
                return reason
    return None
