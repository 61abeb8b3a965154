"""The tests of third_party_plugin run if its package is installed.

tests/test_third_party_plugin.py installs it in a folder of its own.
"""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("modulora_half_quadratic") else ["third_party_plugin"]
