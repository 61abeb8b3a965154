"""The zoo, and what runs it, are found by the tests as modules."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent

sys.path[:0] = [str(HERE), str(HERE / "zoo")]
