"""Joins what ran: the branches of a plugin that no check ran, and those that its author explains.

A branch is called by its module, its function and its source, not by its line, so that an
explanation survives edits::

    modulora_mine.quantizer:Mine.matmul: if rows > 64: -> return self.tiled(x)
    modulora_mine.quantizer:Mine.matmul: self.table if rows > 64 else None
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from coverage import Coverage
from pydantic import BaseModel, ConfigDict, ValidationError

from modulora_conformance.covered.recording import Ran, coverage_of, merge, ran
from modulora_conformance.covered.source import Module, classes_of, modules_of, reached
from modulora_conformance.covered.tour import (
    NUMBA,
    TOO_LONG,
    TRITON,
    WITHOUT,
    copy_of,
    tour,
    write_copies,
)
from modulora_conformance.results import Branch, Branches
from modulora_core.errors import DataError
from modulora_core.spec import Quantizer

TABLE = "[tool.modulora.conformance]"


class Explanation(BaseModel):
    """An entry of ``not_covered`` in a plugin's pyproject.toml.

    Attributes:
        branch: the name of a branch; or ``"module:function"`` or a module, for all in it.
    """

    model_config = ConfigDict(extra="forbid")

    branch: str
    reason: str

    def covers(self, name: str) -> bool:
        return name == self.branch or name.startswith((f"{self.branch}:", f"{self.branch}."))


class Source:
    """The source of a quantizer: its packages, and the recorder of what runs of them."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        classes = classes_of(type(quantizer))
        names = dict.fromkeys(cls.__module__.partition(".")[0] for cls in classes)
        self.packages = {name: found for name in names if (found := modules_of(name))}
        modules = [module for found in self.packages.values() for module in found]
        self.reached = reached(modules, classes)
        self.recorder: Coverage = coverage_of([str(module.path) for module in modules])

    def branches(
        self, options: Sequence[Mapping[str, Any]], larger: Sequence[tuple[int, int, int]] = ()
    ) -> Branches:
        """All branches, after the checks and after the tours with these sets of options."""
        with tempfile.TemporaryDirectory() as folder:
            seen = self._seen(Path(folder).resolve(), options, larger)
            notes = seen.pop("notes")
            units = [u for module in self.reached for u in self._units(module, seen[module.path])]
        return counted(units, explained(self.quantizer), notes)

    def _seen(
        self, folder: Path, options: Sequence[Mapping[str, Any]], larger: Sequence[Any]
    ) -> dict[Any, Any]:
        """What ran, by file, in lines of the file; and ``"notes"`` on what a tour couldn't run."""
        from modulora_conformance.elsewhere import elsewhere

        write_copies(self.packages, folder)
        copies = {
            module.path: copy_of(module.path, found[0].path, folder, name)
            for name, found in self.packages.items()
            for module in found
        }
        toured, notes = coverage_of([f"{folder}/*"]), list[str]()
        for where in self._tours():
            arguments = (self.quantizer.spec.name, options, str(folder), where)
            interpret = {"TRITON_INTERPRET": "1"} if where == TRITON else {}
            sizes = larger if where == WITHOUT else ()
            dumped, faults = elsewhere(tour, *arguments, sizes, **interpret)
            merge(toured, dumped)
            notes += [f"{where}: {fault}" for fault in faults]
        here = ran(self.recorder, [module.path for module in self.reached])
        there = ran(toured, [copies[module.path] for module in self.reached])
        seen: dict[Any, Any] = {"notes": notes}
        for module in self.reached:
            seen[module.path] = _joined(module, here[module.path], there[copies[module.path]])
        return seen

    def _tours(self) -> list[str]:
        """Without compilers, and in place of each compiler that the plugin uses."""
        text = "".join(module.copy for modules in self.packages.values() for module in modules)
        on_gpu = "cuda" in self.quantizer.spec.devices
        found = [WITHOUT]
        found += [NUMBA] if "numba" in text and find_spec("numba") else []
        return found + ([TRITON] if "triton" in text and on_gpu and find_spec("triton") else [])

    def _units(self, module: Module, seen: Ran) -> Iterator[tuple[Branch, bool]]:
        """Each branch of the functions that the quantizer reaches, and whether it ran."""

        def is_reached(line: int) -> bool:
            return any(s.lineno <= line <= (s.end_lineno or 0) for s in self.reached[module])

        def function_of(line: int) -> Any:
            return module.function_at(line) if is_reached(line) else None

        def unit(line: int, text: str, has_run: bool) -> tuple[Branch, bool]:
            function = module.function_at(line)
            where = module.functions[function] if function is not None else ""
            name = f"{module.name}:{where}: {text}"
            return Branch(name=name, file=str(module.path), line=line, source=text), has_run

        lines = seen.lines | seen.missing_lines
        for function in module.functions:
            body = {n for n in lines if function_of(n) is function}
            if not body:
                continue
            called = bool(body & seen.lines)
            yield unit(min(body), f"def {function.name}", called)
            if not called:
                continue  # one line says it
            led_to = set()
            for a, b in sorted(seen.branches | seen.missing_branches):
                if a in body:
                    to = module.text(b) if b > 0 else "the end"
                    led_to |= {b}
                    yield unit(a, f"{module.text(a)} -> {to}", (a, b) in seen.branches)
            previous = 0
            for line in sorted(body):  # of an `except` without a class, say
                if line in seen.missing_lines and previous in seen.lines and line not in led_to:
                    yield unit(line, module.text(line), False)
                previous = line
            for part in module.parts:
                if function_of(part.line) is function:
                    yield unit(part.line, part.text, not seen.parts.isdisjoint(part.copied))
        for part in module.parts:  # a table of lambdas
            if is_reached(part.line) and module.function_at(part.line) is None:
                yield unit(part.line, part.text, not seen.parts.isdisjoint(part.copied))


def _joined(module: Module, here: Ran, there: Ran) -> Ran:
    """What ran of a file or of its copy, in lines of the file; ``parts`` in lines of the copy."""

    def back(line: int) -> int:
        return module.origin[line] if line > 0 else -module.origin[-line]

    lines = here.lines | {back(n) for n in there.lines}
    branches = here.branches | {(back(a), back(b)) for a, b in there.branches}
    all_lines = here.lines | here.missing_lines
    all_branches = here.branches | here.missing_branches
    return Ran(
        lines & all_lines, all_lines - lines, branches & all_branches, all_branches - branches,
        there.parts,
    )  # fmt: skip


def counted(
    units: Sequence[tuple[Branch, bool]],
    explanations: Sequence[Explanation],
    notes: Sequence[str] = (),
) -> Branches:
    """All branches and whether each ran, with the author's explanations."""
    missing = [branch for branch, has_run in units if not has_run]
    found = {b.name: [e for e in explanations if e.covers(b.name)] for b in missing}
    used = {each.branch for entries in found.values() for each in entries}
    cut = any(TOO_LONG in note for note in notes)  # on a slow machine a branch may be left out
    said = [
        b.model_copy(update={"reason": found[b.name][0].reason}) for b in missing if found[b.name]
    ]
    return Branches(
        total=len(units),
        missing=tuple(b for b in missing if not found[b.name]),
        explained=tuple(said),
        stale=() if cut else tuple(e.branch for e in explanations if e.branch not in used),
        notes=tuple(notes),
    )


def explained(quantizer: Quantizer) -> list[Explanation]:
    """The entries of ``not_covered`` in the plugin's pyproject.toml; none without such a file.

    Raises:
        DataError: an entry is malformed.
    """
    file = pyproject_of(quantizer)
    if file is None:
        return []
    table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("modulora", {})
    try:
        entries = table.get("conformance", {}).get("not_covered", [])
        return [Explanation.model_validate(entry) for entry in entries]
    except ValidationError as error:
        raise DataError(
            f"{file}: expected not_covered of {TABLE} as a list of "
            f'{{branch = "...", reason = "..."}}, got {error.errors()[0]["msg"]}'
        ) from None


def pyproject_of(quantizer: Quantizer) -> Path | None:
    """The plugin's pyproject.toml: above its package, or in the folder that pip installed.

    A wheel has none: what it leaves out is then not explained.
    """
    (package, *_) = type(quantizer).__module__.split(".")
    modules = modules_of(package)
    folders = list(modules[0].path.resolve().parents[:4]) if modules else []
    for name in importlib.metadata.packages_distributions().get(package, []):
        recorded = importlib.metadata.distribution(name).read_text("direct_url.json")
        url = urlparse(json.loads(recorded)["url"]) if recorded else None
        folders += [Path(unquote(url.path))] if url is not None and url.scheme == "file" else []
    return _first(folder / "pyproject.toml" for folder in folders)


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
