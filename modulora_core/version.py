"""The installed version of this package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("modulora-core")
except PackageNotFoundError:
    VERSION = "0+unknown"  # a source tree on the path, not installed
