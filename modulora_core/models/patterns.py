"""Match regular expressions from files within a time limit: a crafted one may take years."""

from __future__ import annotations

import functools

import regex

SECONDS = 0.1
"""The time for one match; an ordinary pattern takes microseconds."""

_LONGEST = 2000


def matches(pattern: str, text: str) -> bool:
    """Whether ``pattern`` matches at the beginning of ``text``, as :func:`re.match`.

    Raises:
        ValueError: it is no regular expression, or a long one, or takes more than 0.1 seconds.
    """
    try:
        return _compiled(pattern).match(text, timeout=SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"expected a pattern that ends within {SECONDS} seconds, got {pattern!r:.80}"
        ) from None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > _LONGEST:
        raise ValueError(f"expected at most {_LONGEST} characters, got {pattern!r:.80}")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"expected a regular expression, got {pattern!r:.80}: {error}") from None
