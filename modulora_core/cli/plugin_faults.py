"""Find why a plugin's class can't be imported, without importing it, and so without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modulora_core.registry import Entry

_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][\w.-]*)")


def fault(entry: Entry) -> str | None:
    """Why the class of a quantizer cannot be imported, in a sentence, or None.

    It finds a requirement that is not installed, and a location without a module. Only an import
    finds other faults. The packages around the module are imported.
    """
    if entry.spec is None:
        return None
    missing = [name for name in _requirements(entry.distribution) if not _is_installed(name)]
    if missing:
        return f"needs {' and '.join(missing)}, which isn't installed: pip install " + " ".join(
            missing
        )
    module = entry.spec.location.partition(":")[0]
    try:
        found = f"no module {module}" if find_spec(module) is None else None
    except Exception as error:  # of a package around the module, which may raise anything
        found = f"{type(error).__name__}: {error}"
    return found and (
        f"expected its class at {entry.spec.location}, got {found}; correct location in its spec"
    )


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
