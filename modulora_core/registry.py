"""Quantizers are found by pluggy in the entry-point group ``modulora``.

An entry point names a module that implements :func:`modulora_core.hookspecs.modulora_quantizers`::

    [project.entry-points.modulora]
    mine = "modulora_mine"

Each entry point is read on its own. A failing plugin becomes an entry with its reason, and harms no
other. Reading imports that module only. :func:`load` imports the quantizer's class, and so torch.

``MODULORA_BLOCK=name,...`` disables plugins by the name of a quantizer, an entry point or a
distribution. The module of a blocked entry point or distribution is not imported.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Literal, TypeVar

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
)
from modulora_core.options import parse_options, validate_options
from modulora_core.spec import SUPPORTED_PROTOCOLS, Quantizer, QuantizerSpec
from modulora_core.version import VERSION

BLOCK_VARIABLE = "MODULORA_BLOCK"

Class = TypeVar("Class")

Status = Literal["ok", "broken", "incompatible", "duplicate", "blocked"]

_ERRORS: Mapping[str, type[PluginError]] = {
    "broken": BrokenPluginError,
    "incompatible": IncompatiblePluginError,
    "duplicate": DuplicatePluginError,
    "blocked": BlockedPluginError,
}

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of ``modulora list-quantizers``.

    Attributes:
        name: the quantizer's name, or the entry point's if the plugin cannot be read.
        spec: the plugin's facts; None if it cannot be read.
        distribution: the installed package that brings it.
        version: the version of that package.
        status: ``"ok"``, or why it cannot be used.
        reason: one sentence; None when ``status`` is ``"ok"``.
    """

    name: str
    spec: QuantizerSpec | None
    distribution: str
    version: str
    status: Status = "ok"
    reason: str | None = None

    @property
    def origin(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}"


def entries() -> list[Entry]:
    """Every installed quantizer, usable or not, sorted by name. No plugin makes it fail."""
    return list(_discover(*_environment()))


def find(name: str, *, distribution: str | None = None) -> Entry:
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
    named = [entry for entry in _cached(*environment) if entry.name == name]
    if not named:
        raise UnknownQuantizerError(_unknown(name, _cached(*environment), distribution))
    entry = min(named, key=lambda entry: entry.status == "blocked")  # False comes first
    if entry.status != "ok":
        raise _unusable(entry, entry.status, str(entry.reason))
    return entry


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


def import_class(entry: Entry, location: str, base: type[Class]) -> type[Class]:
    """Import the class at ``location``, ``"package.module:Class"``, of a plugin.

    Raises:
        BrokenPluginError: it cannot be imported, or is not a complete subclass of ``base``.
    """
    module_name, class_name = location.split(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:
        reason = f"importing {location} failed: {_in_one_line(error)}"
        raise _unusable(entry, "broken", reason) from error
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        reason = f"expected a subclass of {base.__name__} at {location}, got {cls!r}"
        raise _unusable(entry, "broken", reason)
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise _unusable(entry, "broken", f"{location} doesn't implement {', '.join(missing)}")
    return cls


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


def _discover(path: tuple[str, ...], blocked: frozenset[str]) -> tuple[Entry, ...]:
    del path  # a key of the cache
    found = [
        entry for point in entry_points(group=hookspecs.PROJECT) for entry in _read(point, blocked)
    ]
    counts = Counter(entry.name for entry in found if entry.status != "blocked")
    marked = [_duplicate(entry, found) if counts[entry.name] > 1 else entry for entry in found]
    return tuple(sorted(marked, key=lambda entry: (entry.name, entry.distribution)))


_cached = lru_cache(maxsize=1)(_discover)


def _read(point: EntryPoint, blocked: frozenset[str]) -> Iterator[Entry]:
    entry = Entry(point.name, None, *_distribution(point))
    if {_normal(point.name), _normal(entry.distribution)} & blocked:
        yield _blocked(entry)
        return
    try:
        specs = _ask(point)
    except (Exception, SystemExit) as error:  # a plugin may do anything when it is imported
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


def _ask(point: EntryPoint) -> list[QuantizerSpec]:
    """Call the hook of one plugin, with a plugin manager of its own."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()  # raises for a hook that this project does not have
    hook = manager.hook.modulora_quantizers
    if not hook.get_hookimpls():
        raise TypeError(f"{point.value} has no hook; mark its modulora_quantizers with @hookimpl")
    (specs,) = hook() or (None,)  # pluggy leaves out a None
    if not isinstance(specs, list | tuple) or not all(isinstance(s, QuantizerSpec) for s in specs):
        raise TypeError(
            f"modulora_quantizers of {point.value}: expected a list of QuantizerSpec, got {specs!r}"
        )
    return list(specs)


def _other_protocol(entry: Entry, protocol: int) -> str:
    first, last = SUPPORTED_PROTOCOLS[0], SUPPORTED_PROTOCOLS[-1]
    supported = str(first) if first == last else f"{first} to {last}"
    return (
        f"written for protocol {protocol}, and modulora-core {VERSION} supports {supported}; "
        f"install a version of {entry.distribution} or of modulora-core that fits"
    )


def _blocked(entry: Entry) -> Entry:
    reason = f"disabled by {BLOCK_VARIABLE}={os.environ[BLOCK_VARIABLE]}"
    return replace(entry, status="blocked", reason=reason)


def _duplicate(entry: Entry, found: list[Entry]) -> Entry:
    if entry.status == "blocked":
        return entry
    same = [other for other in found if other.name == entry.name and other.status != "blocked"]
    origins, last = " and ".join(other.origin for other in same), same[-1].distribution
    reason = f"brought by {origins}; uninstall one, or disable it with {BLOCK_VARIABLE}={last}"
    return replace(entry, status="duplicate", reason=reason)


def _unusable(entry: Entry, status: Status, reason: str) -> PluginError:
    subject = f"quantizer {entry.name!r}"
    if status == "duplicate":
        return DuplicatePluginError(f"{subject}: {reason}")
    if status == "broken":
        advice = f"reinstall or update {entry.distribution}, or report it to its authors"
        return BrokenPluginError(f"{subject} of {entry.origin} is broken: {reason}", advice)
    return _ERRORS[status](f"{subject} of {entry.origin}: {reason}")


def _unknown(name: str, found: tuple[Entry, ...], distribution: str | None) -> str:
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
        install = "run `pip install ./plugins/kernels ./plugins/NAME` in a clone of ModuLoRA"
        return sentence if near else f"{sentence}. Each quantizer comes in a package: {install}"
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
