"""The core's tiny models, packed with its quantizer for tests; and the modules beside the tests."""

import sys
from pathlib import Path

from modulora_core.tests.conftest import pack, toy, toy_root, tunable  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
