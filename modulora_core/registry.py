"""Plugins are found by pluggy in the entry-point group ``modulora``.

An entry point names a module that implements hooks of :mod:`modulora_core.hookspecs`::

    [project.entry-points.modulora]
    mine = "modulora_mine"

Each entry point is read on its own. A failing plugin becomes an entry with its reason, and harms no
other. Reading imports that module only. :func:`load` imports the quantizer's class, and so torch.

``MODULORA_BLOCK=name,...`` disables plugins by the name of a quantizer, a format, a command, an
entry point or a distribution. The module of a blocked entry point or distribution is not imported.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires, version
from typing import Any, Generic, Literal, TypeVar

import pluggy
from pydantic import BaseModel, ValidationError

from modulora_core import hookspecs
from modulora_core.arguments import checked
from modulora_core.errors import (
    BlockedPluginError,
    BrokenPluginError,
    DuplicatePluginError,
    IncompatiblePluginError,
    OptionError,
    PluginError,
    UnknownQuantizerError,
    lacks_memory,
)
from modulora_core.hookspecs import CommandSpec, FormatSpec
from modulora_core.options import parse_options, validate_options
from modulora_core.spec import SUPPORTED_PROTOCOLS, PluginSpec, Quantizer, QuantizerSpec
from modulora_core.version import VERSION

BLOCK_VARIABLE = "MODULORA_BLOCK"

CORE = f"{hookspecs.PROJECT}-core"
"""The distribution of this package."""

INSTALL = "run `pip install -r plugins/requirements.txt` in a clone of ModuLoRA"
"""README's line that installs all of our plugins, for messages."""

HOOKS: Mapping[str, type[PluginSpec]] = {
    "modulora_quantizers": QuantizerSpec,
    "modulora_formats": FormatSpec,
    "modulora_commands": CommandSpec,
}
"""Each hook, and the class of its results."""

Class = TypeVar("Class")
Spec = TypeVar("Spec", bound=PluginSpec)

Status = Literal["ok", "broken", "incompatible", "duplicate", "blocked"]

_ERRORS: Mapping[str, type[PluginError]] = {
    "broken": BrokenPluginError,
    "incompatible": IncompatiblePluginError,
    "duplicate": DuplicatePluginError,
    "blocked": BlockedPluginError,
}

_KINDS = {QuantizerSpec: "quantizer", FormatSpec: "format", CommandSpec: "command"}

_EXTRA = re.compile(rf"({hookspecs.PROJECT}-[\w.-]+?)[^\w.-].*;\s*extra\s*==\s*['\"]([\w-]+)['\"]")

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Entry(Generic[Spec]):
    """A quantizer, a format or a command of an installed plugin; or a plugin that can't be read.

    Attributes:
        name: of the quantizer, format or command; or the entry point's if it cannot be read.
        spec: the plugin's facts; None if it cannot be read.
        distribution: the installed package that brings it.
        version: the version of that package.
        status: ``"ok"``, or why it cannot be used.
        reason: one sentence; None when ``status`` is ``"ok"``.
    """

    name: str
    spec: Spec | None
    distribution: str
    version: str
    status: Status = "ok"
    reason: str | None = None

    @property
    def origin(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}"

    @property
    def kind(self) -> str:
        """``"quantizer"``, ``"format"``, ``"command"``; ``"plugin"`` if it cannot be read."""
        return "plugin" if self.spec is None else _KINDS[type(self.spec)]


def entries() -> list[Entry[QuantizerSpec]]:
    """Every installed quantizer, usable or not, and plugins that can't be read, sorted by name."""
    found = _discover(*_environment())
    return [entry for entry in found if entry.kind in ("quantizer", "plugin")]


def formats() -> list[Entry[FormatSpec]]:
    """Every installed format, usable or not, sorted by name."""
    return [entry for entry in _cached(*_environment()) if entry.kind == "format"]


def commands() -> list[Entry[CommandSpec]]:
    """Every installed command, usable or not, sorted by name."""
    return [entry for entry in _cached(*_environment()) if entry.kind == "command"]


def unreadable() -> list[Entry[Any]]:
    """The plugins that can't be read, each with its reason."""
    return [entry for entry in _cached(*_environment()) if entry.status == "broken"]


def find(name: str, *, distribution: str | None = None) -> Entry[QuantizerSpec]:
    """Find a usable quantizer.

    Args:
        name: the quantizer's name.
        distribution: the package that brings it, for the message when it is not installed.

    Raises:
        UnknownQuantizerError: no plugin brings it; says near misses and the package to install.
        BrokenPluginError: its plugin cannot be read.
        IncompatiblePluginError: its plugin was written for a protocol that this core does not
            speak.
        DuplicatePluginError: several plugins bring it.
        BlockedPluginError: ``MODULORA_BLOCK`` disables it.
    """
    environment = _environment()
    if not any(entry.name == name and entry.status == "ok" for entry in _cached(*environment)):
        _cached.cache_clear()  # it may have been installed since, as happens in a notebook
    found = [each for each in _cached(*environment) if each.kind in ("quantizer", "plugin")]
    named = [entry for entry in found if entry.name == name]
    if not named:
        raise UnknownQuantizerError(_unknown(name, found, distribution))
    return usable(named)


def usable(named: list[Entry[Spec]]) -> Entry[Spec]:
    """The entry that can be used, of one name.

    Raises:
        PluginError: there is none; the class says why, as in :func:`find`.
    """
    entry = min(named, key=lambda entry: entry.status == "blocked")  # False comes first
    if entry.status != "ok":
        raise _unusable(entry, entry.status, str(entry.reason))
    return entry


def providers() -> dict[str, str]:
    """The distribution of commands, formats and file suffixes of our plugins, installed or not.

    An extra of the core requires the plugin. It is called after the command, or ``format-NAME`` or
    ``file-SUFFIX``.
    """
    try:
        found = map(_EXTRA.fullmatch, requires(CORE) or ())
    except PackageNotFoundError:  # a source tree on the path, not installed
        return {}
    return {one[2]: one[1] for one in found if one is not None}


def absence(distribution: str) -> str:
    """Why nothing of one of our distributions is found, and what to do, for a message."""
    found = (each for each in _cached(*_environment()) if each.distribution == distribution)
    blocked = (f"is {each.reason}" for each in found if each.status == "blocked")
    absent = f"isn't installed: {INSTALL}"
    return f"{distribution}, which {next(blocked, absent)}"


def load(name: str, *, distribution: str | None = None) -> type[Quantizer]:
    """Import the class of a quantizer, and so torch.

    Raises:
        PluginError: as :func:`find`; BrokenPluginError also if the class cannot be imported, is not
            a complete :class:`~modulora_core.spec.Quantizer`, or has another spec than the listed
            one.
    """
    entry = find(name, distribution=distribution)
    assert entry.spec is not None  # find() returns usable entries only
    # mypy's type[T] takes no abstract class; import_class returns none
    cls = import_class(entry, entry.spec.location, Quantizer)  # type: ignore[type-abstract]
    found = getattr(cls, "spec", None)
    if found != entry.spec:
        reason = f"expected {cls.__name__}.spec to equal the listed {entry.spec}, got {found}"
        raise _unusable(entry, "broken", reason)
    options: object = cls.Options
    if not (inspect.isclass(options) and issubclass(options, BaseModel)):
        reason = f"expected {cls.__name__}.Options to be a pydantic model, got {options!r}"
        raise _unusable(entry, "broken", reason)
    return cls


def import_class(entry: Entry[Any], location: str, base: type[Class]) -> type[Class]:
    """Import the class at ``location``, ``"package.module:Class"``, of a plugin.

    Raises:
        BrokenPluginError: it cannot be imported, or is not a complete subclass of ``base``.
    """
    cls = _imported(entry, location)
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        reason = f"expected a subclass of {base.__name__} at {location}, got {cls!r}"
        raise _unusable(entry, "broken", reason)
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise _unusable(entry, "broken", f"{location} doesn't implement {', '.join(missing)}")
    return cls


def import_function(entry: Entry[Any], location: str) -> Callable[..., Any]:
    """Import the function at ``location``, ``"package.module:function"``, of a plugin.

    Raises:
        BrokenPluginError: it cannot be imported, or is no function.
    """
    function = _imported(entry, location)
    if not inspect.isfunction(function):
        raise _unusable(entry, "broken", f"expected a function at {location}, got {function!r}")
    return function


def _imported(entry: Entry[Any], location: str) -> Any:
    module, name = location.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        if lacks_memory(error):
            raise
        reason = f"importing {location} failed: {_in_one_line(error)}"
        raise _unusable(entry, "broken", reason) from error


@checked
def create(
    name: str, options: Mapping[str, object] | None = None, *, distribution: str | None = None
) -> Quantizer:
    """Construct a quantizer with validated options.

    Args:
        name: the quantizer's name.
        options: by name; strings are parsed to the types of the options.
        distribution: as for :func:`find`.

    Raises:
        PluginError: as :func:`load`.
        OptionError: an option is unknown, or the quantizer's ``Options`` refuses its value.
    """
    cls = load(name, distribution=distribution)
    return cls(validate_options(name, cls.Options, options or {}))


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantizer's name with options. :meth:`create` checks them."""

    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, subject: str = "choice") -> Choice:
        """Read ``NAME`` or ``NAME:KEY=VALUE,...``; values stay strings.

        Args:
            subject: the flag or field that holds ``text``, for messages.

        Raises:
            OptionError: ``text`` is neither, or a key comes twice.
        """
        name, colon, options = text.partition(":")
        if not name or (colon and not options):
            raise OptionError(f"{subject}: expected NAME or NAME:KEY=VALUE,..., got {text!r}")
        return cls(name, parse_options(options.split(",") if options else []))

    @property
    def label(self) -> str:
        """The text that :meth:`parse` reads."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.quantizer}:{options}" if options else self.quantizer

    def create(self) -> Quantizer:
        """The quantizer. Raises PluginError and OptionError as :func:`create`."""
        return create(self.quantizer, self.options)


def _environment() -> tuple[tuple[str, ...], frozenset[str]]:
    """The path and the blocked names, on which discovery depends."""
    names = os.environ.get(BLOCK_VARIABLE, "").split(",")
    return tuple(sys.path), frozenset(_normal(name) for name in names if name.strip())


def _normal(name: str) -> str:
    """Package names are compared in this form: ``My_Package`` is ``my-package``."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _discover(path: tuple[str, ...], blocked: frozenset[str]) -> tuple[Entry[Any], ...]:
    del path  # a key of the cache
    found = [
        entry for point in entry_points(group=hookspecs.PROJECT) for entry in _read(point, blocked)
    ]
    counts = Counter((each.kind, each.name) for each in found if each.status != "blocked")
    marked = [
        _duplicate(each, found) if counts[each.kind, each.name] > 1 else each for each in found
    ]
    return tuple(sorted(marked, key=lambda entry: (entry.name, entry.distribution)))


_cached = lru_cache(maxsize=1)(_discover)


def _read(point: EntryPoint, blocked: frozenset[str]) -> Iterator[Entry[Any]]:
    entry: Entry[Any] = Entry(point.name, None, *_distribution(point))
    if {_normal(point.name), _normal(entry.distribution)} & blocked:
        yield _blocked(entry)
        return
    try:
        specs = _ask(point)
    except (Exception, SystemExit) as error:  # a plugin may do anything when it is imported
        if lacks_memory(error):
            raise
        yield replace(entry, status="broken", reason=_in_one_line(error))
        return
    for spec in specs:
        named = replace(entry, name=spec.name, spec=spec)
        if spec.name in blocked:
            yield _blocked(named)
        elif spec.protocol not in SUPPORTED_PROTOCOLS:
            yield replace(
                named, status="incompatible", reason=_other_protocol(named, spec.protocol)
            )
        else:
            yield named


def _ask(point: EntryPoint) -> list[PluginSpec]:
    """Call the hooks of one plugin, with a plugin manager of its own."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()  # raises for a hook that this project does not have
    implemented = [name for name in HOOKS if getattr(manager.hook, name).get_hookimpls()]
    if not implemented:
        raise TypeError(f"{point.value} has no hook; mark one of {', '.join(HOOKS)} with @hookimpl")
    found: list[PluginSpec] = []
    for name in implemented:
        (specs,) = getattr(manager.hook, name)() or (None,)  # pluggy leaves out a None
        expected = HOOKS[name]
        if not isinstance(specs, list | tuple) or not all(isinstance(s, expected) for s in specs):
            raise TypeError(
                f"{name} of {point.value}: expected a list of {expected.__name__}, got {specs!r}"
            )
        found += specs
    return found


def _other_protocol(entry: Entry[Any], protocol: int) -> str:
    first, last = SUPPORTED_PROTOCOLS[0], SUPPORTED_PROTOCOLS[-1]
    supported = str(first) if first == last else f"{first} to {last}"
    return (
        f"written for protocol {protocol}, and {CORE} {VERSION} supports {supported}; "
        f"install a version of {entry.distribution} or of modulora-core that fits"
    )


def _blocked(entry: Entry[Any]) -> Entry[Any]:
    reason = f"disabled by {BLOCK_VARIABLE}={os.environ[BLOCK_VARIABLE]}"
    return replace(entry, status="blocked", reason=reason)


def _duplicate(entry: Entry[Any], found: list[Entry[Any]]) -> Entry[Any]:
    if entry.status == "blocked":
        return entry
    same = [
        other for other in found
        if (other.kind, other.name) == (entry.kind, entry.name) and other.status != "blocked"
    ]  # fmt: skip
    origins, last = " and ".join(other.origin for other in same), same[-1].distribution
    reason = f"brought by {origins}; uninstall one, or disable it with {BLOCK_VARIABLE}={last}"
    return replace(entry, status="duplicate", reason=reason)


def _unusable(entry: Entry[Any], status: Status, reason: str) -> PluginError:
    subject = f"{'quantizer' if entry.spec is None else entry.kind} {entry.name!r}"
    if status == "duplicate":
        return DuplicatePluginError(f"{subject}: {reason}")
    if status == "broken":
        advice = f"reinstall or update {entry.distribution}, or report it to its authors"
        return BrokenPluginError(f"{subject} of {entry.origin} is broken: {reason}", advice)
    return _ERRORS[status](f"{subject} of {entry.origin}: {reason}")


def _unknown(name: str, found: list[Entry[QuantizerSpec]], distribution: str | None) -> str:
    usable = sorted({entry.name for entry in found if entry.status == "ok"})
    base, _, options = str(name).partition(":")
    if options and base in usable:
        flags = " ".join(f"-o {option}" for option in options.split(","))
        return f"quantizer {name!r}: expected a name alone, got options too; give -q {base} {flags}"
    near = difflib.get_close_matches(str(name), [entry.name for entry in found], n=2)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    sentence = f"quantizer {name!r} isn't installed{hint} Installed: {', '.join(usable) or 'none'}"
    unusable = [f"{entry.name} ({entry.status})" for entry in found if entry.status != "ok"]
    sentence += f"; not usable: {', '.join(unusable)}" if unusable else ""
    if distribution is None or not _DISTRIBUTION.fullmatch(distribution):
        return (
            sentence
            if near
            else f"{sentence}. Each quantizer comes in a package; for ours, {INSTALL}"
        )
    try:
        present = version(distribution)
    except PackageNotFoundError:
        return f"{sentence}. Install its package, {distribution}, from a folder or a wheel"
    return f"{sentence}. {distribution} {present} lacks it; install a newer version"


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """The name and the version of the package that has this entry point."""
    try:
        assert point.dist is not None
        return str(point.dist.name), str(point.dist.version)
    except Exception:  # damaged metadata: importlib.metadata's errors differ by version of Python
        return "unknown distribution", "?"


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False)
        fields = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in found]
        return f"{error.title}: {'; '.join(fields)}"
    return " ".join(f"{type(error).__name__}: {error}".split())
