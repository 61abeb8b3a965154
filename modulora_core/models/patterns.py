"""Match regular expressions from files."""

from __future__ import annotations

import re


def matches(pattern: str, text: str) -> bool:
    """Whether ``pattern`` matches at the beginning of ``text``, as :func:`re.match`.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        return re.match(pattern, text) is not None
    except (re.error, RecursionError) as error:
        raise ValueError(f"expected a regular expression, got {pattern!r:.80}: {error}") from None
