"""The third party's tests are the third party's: they run where its package is installed, as ``tests/test_third_party_plugin.py`` does."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("modulora_half_quadratic") else ["third_party_plugin"]
