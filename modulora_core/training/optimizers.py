"""Check the name of an optimizer. Importing this module imports neither torch nor transformers."""

from __future__ import annotations

import difflib

from modulora_core.errors import OptionError


def check_optimizer_name(name: str) -> None:
    """Refuse a name that transformers doesn't know. Raises OptionError, with near misses."""
    from transformers.training_args import OptimizerNames

    names = [known.value for known in OptimizerNames]
    if name not in names:
        near = difflib.get_close_matches(name, names) or names
        raise OptionError(
            f"optim {name!r}: transformers has no such optimizer; expected {' or '.join(near)}"
        )
