"""The tests of a third-party package run if it is installed.

tests/test_third_party_packages.py installs each in a folder of its own.
"""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = {
    "third_party_plugin": "modulora_half_quadratic",
    "third_party_format": "modulora_quanto",
    "third_party_command": "modulora_weigh",
}

collect_ignore = [folder for folder, module in PACKAGES.items() if not find_spec(module)]
