"""Finding quantizers: pluggy over the entry-point group ``modulora``.

An entry point names a module that implements :func:`modulora_core.hookspecs.modulora_quantizers`::

    [project.entry-points.modulora]
    mine = "modulora_mine"

Every entry point is read on its own: one that fails becomes an entry with the reason, and harms no other.
Reading imports that module only, not the one that has the quantizer's class, and so not torch; :func:`load`
imports the class.

``MODULORA_BLOCK=name,...`` disables plugins by the name of a quantizer, an entry point or a distribution; one
that is blocked by the latter two isn't even imported.
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
from modulora_core.errors import (
    BlockedPluginError,
    BrokenPluginError,
    DuplicatePluginError,
    IncompatiblePluginError,
    OptionError,
    UnknownQuantizerError,
)
from modulora_core.options import parse_options, validate_options
from modulora_core.spec import SUPPORTED_PROTOCOLS, Quantizer, QuantizerSpec

__all__ = [
    "BLOCK_VARIABLE",
    "Choice",
    "Entry",
    "create",
    "entries",
    "find",
    "import_class",
    "load",
    "parse_options",
]

BLOCK_VARIABLE = "MODULORA_BLOCK"

Class = TypeVar("Class")

Status = Literal["ok", "broken", "incompatible", "blocked"]

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of ``modulora list-quantizers``.

    Attributes:
        name: the quantizer's name; the entry point's where the plugin couldn't tell its own.
        spec: what the plugin says of it; None where it couldn't be asked.
        distribution: the installed package that brings it, and its ``version``.
        status: ``"ok"``, or why it can't be used.
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
        """The distribution and its version, as messages name it."""
        return f"{self.distribution} {self.version}"


def entries() -> list[Entry]:
    """Everything that is installed, usable or not, sorted by name. It never fails because of a plugin."""
    found = list(_discover(_environment()))
    counts = Counter(entry.name for entry in found if entry.status != "blocked")
    marked = [_duplicate(entry, found) if counts[entry.name] > 1 else entry for entry in found]
    return sorted(marked, key=lambda entry: (entry.name, entry.distribution))


def find(name: str, *, distribution: str | None = None) -> Entry:
    """Look a usable quantizer up.

    Args:
        name: the quantizer's name.
        distribution: the package that a checkpoint says it needs, for the message when it isn't installed.

    Raises:
        UnknownQuantizerError: no plugin brings it; says near misses, what is installed, what to install.
        BrokenPluginError: its plugin can't be read.
        IncompatiblePluginError: its plugin was written for a protocol that this core doesn't support.
        DuplicatePluginError: several plugins bring it.
        BlockedPluginError: ``MODULORA_BLOCK`` disables it.
    """
    key = _environment()
    found = _cached(key)
    if not any(entry.name == name and entry.status == "ok" for entry in found):
        _cached.cache_clear()  # perhaps installed or mended since, as happens in a notebook
        found = _cached(key)
    named = [entry for entry in found if entry.name == name]
    usable = [entry for entry in named if entry.status != "blocked"]
    if len(usable) > 1:
        raise DuplicatePluginError(f"quantizer {name!r}: {_duplicate(usable[0], found).reason}")
    if usable:
        return _checked(usable[0])
    if named:
        raise BlockedPluginError(f"quantizer {name!r} of {named[0].origin}: {named[0].reason}")
    raise UnknownQuantizerError(_unknown(name, found, distribution))


def load(name: str, *, distribution: str | None = None) -> type[Quantizer]:
    """Import the quantizer's class. This is where torch gets imported.

    Raises:
        PluginError: as :func:`find`; BrokenPluginError also when the class can't be imported, isn't a
            complete :class:`~modulora_core.spec.Quantizer`, or has another spec than the listed one.
    """
    entry = find(name, distribution=distribution)
    assert entry.spec is not None  # find() returns usable entries only
    cls = import_class(entry, entry.spec.location, Quantizer)  # type: ignore[type-abstract]  # it is no abstract class, as import_class makes sure
    class_name = cls.__name__
    if getattr(cls, "spec", None) != entry.spec:
        raise _broken(
            entry,
            f"expected {class_name}.spec to equal the listed {entry.spec}, got {_spec_of(cls)}",
        )
    if not (inspect.isclass(cls.Options) and issubclass(cls.Options, BaseModel)):
        raise _broken(
            entry, f"expected {class_name}.Options to be a pydantic model, got {cls.Options!r}"
        )
    return cls


def import_class(entry: Entry, location: str, base: type[Class]) -> type[Class]:
    """Import what a plugin says is at ``location``, ``"package.module:Class"``.

    Raises:
        BrokenPluginError: it can't be imported, or isn't a complete subclass of ``base``.
    """
    module_name, class_name = location.split(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:
        raise _broken(entry, f"importing {location} failed: {_told(error)}") from error
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise _broken(
            entry,
            f"expected a subclass of modulora_core.{base.__name__} at {location}, got {cls!r}",
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise _broken(entry, f"{location} doesn't implement {', '.join(missing)}")
    return cls


def create(
    name: str, options: Mapping[str, object] | None = None, *, distribution: str | None = None
) -> Quantizer:
    """Construct a quantizer with validated options.

    Args:
        name: the quantizer's name.
        options: by name; strings, as ``key=value`` gives them, are parsed to the options' types.
        distribution: as for :func:`find`.

    Raises:
        PluginError: as :func:`load`.
        OptionError: an option that is unknown or that the quantizer's ``Options`` refuses.
    """
    cls = load(name, distribution=distribution)
    return cls(validate_options(name, cls.Options, options or {}))


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantizer by name, with options of it; nothing is checked before :meth:`create`."""

    quantizer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, subject: str = "choice") -> Choice:
        """Read ``NAME`` or ``NAME:KEY=VALUE,...``. Option values stay strings.

        Args:
            subject: what it was said to, as ``--choices``; the message begins with it.

        Raises:
            OptionError: it is neither, or a key comes twice.
        """
        name, colon, options = text.partition(":")
        if not name or (colon and not options):
            raise OptionError(f"{subject}: expected NAME or NAME:KEY=VALUE,..., got {text!r}")
        return cls(name, parse_options(options.split(",") if options else []))

    @property
    def label(self) -> str:
        """As :meth:`parse` reads it."""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.quantizer}:{options}" if options else self.quantizer

    def create(self) -> Quantizer:
        """The quantizer. Raises PluginError where its plugin can't be used, OptionError for wrong options."""
        return create(self.quantizer, self.options)


@dataclass(frozen=True, slots=True)
class _Environment:
    """What discovery depends on, so that a cached result is never used for another path or block list."""

    path: tuple[str, ...]
    blocked: frozenset[str]


def _environment() -> _Environment:
    names = os.environ.get(BLOCK_VARIABLE, "").split(",")
    return _Environment(tuple(sys.path), frozenset(_normal(name) for name in names if name.strip()))


def _normal(name: str) -> str:
    """As packages are compared: ``My_Package`` is ``my-package``."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


@lru_cache(maxsize=1)
def _cached(key: _Environment) -> tuple[Entry, ...]:
    return tuple(_discover(key))


def _discover(key: _Environment) -> Iterator[Entry]:
    for point in entry_points(group=hookspecs.PROJECT):
        distribution, its_version = _distribution(point)
        entry = Entry(point.name, None, distribution, its_version)
        if {_normal(point.name), _normal(distribution)} & key.blocked:
            yield _blocked(entry)
            continue
        try:
            specs = _read(point)
        except (Exception, SystemExit) as error:  # a plugin may do anything when it is imported
            yield replace(entry, status="broken", reason=_told(error))
            continue
        for spec in specs:
            yield _judged(replace(entry, name=spec.name, spec=spec), key)


def _read(point: EntryPoint) -> list[QuantizerSpec]:
    """Ask one plugin, with a plugin manager of its own: what it does wrong stays with it."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()  # a hook that this project doesn't have
    if not manager.hook.modulora_quantizers.get_hookimpls():
        raise TypeError(
            f"{point.value} implements no hook; mark its modulora_quantizers with @hookimpl"
        )
    (specs,) = manager.hook.modulora_quantizers() or (None,)  # pluggy leaves a None out
    if not isinstance(specs, (list, tuple)) or not all(
        isinstance(spec, QuantizerSpec) for spec in specs
    ):
        raise TypeError(
            f"modulora_quantizers of {point.value}: expected a list of QuantizerSpec, got {specs!r}"
        )
    return list(specs)


def _judged(entry: Entry, key: _Environment) -> Entry:
    assert entry.spec is not None
    if entry.name in key.blocked:
        return _blocked(entry)
    if entry.spec.protocol not in SUPPORTED_PROTOCOLS:
        reason = (
            f"written for protocol {entry.spec.protocol}, and modulora-core {_core_version()} supports "
            f"{_supported()}; install a version of {entry.distribution} or of modulora-core that fits"
        )
        return replace(entry, status="incompatible", reason=reason)
    return entry


def _checked(entry: Entry) -> Entry:
    if entry.status == "incompatible":
        raise IncompatiblePluginError(f"quantizer {entry.name!r} of {entry.origin}: {entry.reason}")
    if entry.status == "broken":
        raise _broken(entry, str(entry.reason))
    return entry


def _broken(entry: Entry, reason: str) -> BrokenPluginError:
    advice = f"reinstall or update {entry.distribution}, or tell its authors"
    return BrokenPluginError(
        f"quantizer {entry.name!r} of {entry.origin} is broken: {reason}; {advice}"
    )


def _blocked(entry: Entry) -> Entry:
    return replace(
        entry, status="blocked", reason=f"disabled by {BLOCK_VARIABLE}={os.environ[BLOCK_VARIABLE]}"
    )


def _duplicate(entry: Entry, found: list[Entry] | tuple[Entry, ...]) -> Entry:
    if entry.status == "blocked":
        return entry
    same = [other for other in found if other.name == entry.name and other.status != "blocked"]
    origins = " and ".join(other.origin for other in same)
    reason = f"brought by {origins}; uninstall one, or disable it with {BLOCK_VARIABLE}={same[-1].distribution}"
    return replace(entry, status="broken", reason=reason)


def _unknown(name: str, found: tuple[Entry, ...], distribution: str | None) -> str:
    usable = sorted({entry.name for entry in found if entry.status == "ok"})
    base, _, options = name.partition(":")
    if options and base in usable:
        apart = " ".join(f"-o {option}" for option in options.split(","))
        return f"quantizer {name!r}: expected a name alone, got one with options; they go apart: -q {base} {apart}"
    near = difflib.get_close_matches(name, [entry.name for entry in found], n=2)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    sentence = f"quantizer {name!r} isn't installed{meant} Installed: {', '.join(usable) or 'none'}"
    unusable = [f"{entry.name} ({entry.status})" for entry in found if entry.status != "ok"]
    sentence += f"; not usable: {', '.join(unusable)}" if unusable else ""
    if distribution is None or not _DISTRIBUTION.fullmatch(distribution):
        return sentence
    try:
        present = version(distribution)
    except PackageNotFoundError:
        return f"{sentence}. It is in a package of its own: pip install {distribution}"
    return f"{sentence}. {distribution} {present} doesn't bring it: pip install -U {distribution}"


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """The name and version of the package that has this entry point, also where its metadata is damaged."""
    try:
        assert point.dist is not None
        return str(point.dist.name), str(point.dist.version)
    except Exception:  # importlib.metadata raises several kinds, by version of Python
        return "unknown distribution", "?"


def _core_version() -> str:
    from modulora_core import __version__

    return str(__version__)


def _supported() -> str:
    first, last = SUPPORTED_PROTOCOLS[0], SUPPORTED_PROTOCOLS[-1]
    return str(first) if first == last else f"{first} to {last}"


def _spec_of(cls: type[Quantizer]) -> object:
    return getattr(cls, "spec", "none")


def _told(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False)
        fields = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in found]
        return f"{error.title}: {'; '.join(fields)}"
    return " ".join(f"{type(error).__name__}: {error}".split())
