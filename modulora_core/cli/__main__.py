"""``python -m modulora_core.cli``."""

from __future__ import annotations

import sys

from modulora_core.cli import main

sys.exit(main())
