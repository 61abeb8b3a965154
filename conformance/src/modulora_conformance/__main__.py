"""``python -m modulora_conformance ...`` is ``modulora conformance ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from modulora_core.cli import main as modulora


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 all passed, 1 some failed, 2 wrong request."""
    return modulora(["conformance", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
