"""Options that take all the words up to the next option: ``--choices first second third``.

Click's options take a fixed number of words. A command that declares such an option as a list, which click fills by repeating it,
and names it in ``LISTS`` of its :class:`WordLists` gets both spellings.
"""

from __future__ import annotations

from typing import Any, ClassVar

import typer.core


class WordLists(typer.core.TyperCommand):
    """A command with such options; a subclass names them."""

    LISTS: ClassVar[tuple[str, ...]] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        try:
            args = repeated(args, self.LISTS)
        except ValueError as error:
            ctx.fail(str(error))
        return super().parse_args(ctx, args)


def repeated(words: list[str], options: tuple[str, ...]) -> list[str]:
    """``--o a b`` as ``--o a --o b``; after ``--`` words stay as they are.

    Raises:
        ValueError: no word follows one of ``options``.
    """
    result: list[str] = []
    current: str | None = None  # the option whose words these are
    for i, word in enumerate(words):
        if word == "--":
            return [*result, *words[i:]]
        if word in options:
            if i + 1 == len(words) or words[i + 1].startswith("-"):
                raise ValueError(f"{word}: expected one or more words after it, got none")
            current = word
        elif word.startswith("-"):
            current = None
            result.append(word)
        else:
            result += [word] if current is None else [current, word]
    return result
