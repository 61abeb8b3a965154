"""Read the fenced blocks of a Markdown page, and do to a folder what the page tells its reader."""

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NEXT_PLACE = "@@\n"
"""The line between two places of one file in a diff."""


@dataclass(frozen=True)
class Block:
    """A fenced block. ``title`` is the file that it belongs to, or empty."""

    language: str
    title: str
    text: str


def blocks(page, *languages):
    """The blocks of these languages, in order."""
    found = (Block(m[1], m[2] or "", m[3]) for m in _BLOCK.finditer(page.read_text("utf-8")))
    return [block for block in found if block.language in languages]


def commands(page, program=""):
    """The commands after ``$`` in the console blocks, perhaps of one program only.

    A backslash at the end of a line continues the command.
    """
    text = "".join(block.text for block in blocks(page, "console")).replace("\\\n", " ")
    found = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    return [line for line in found if line.split()[0] == program or not program]


def follow(page, folder):
    """Write the Python blocks that have a title to files of that name, and apply the diffs."""
    for block in blocks(page, "python", "diff"):
        if not block.title:
            continue
        file = folder / block.title
        if block.language == "python":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, "utf-8")
            continue
        text = file.read_text("utf-8")
        for before, after in _places(block.text):
            assert text.count(before) == 1, f"{block.title}: {text.count(before)} times\n{before}"
            text = text.replace(before, after)
        file.write_text(text, "utf-8")


def _places(diff):
    """The lines before and after, at each place."""
    for place in diff.split(NEXT_PLACE):
        lines = place.splitlines(keepends=True)
        yield (
            "".join(line[1:] for line in lines if line[0] in " -"),
            "".join(line[1:] for line in lines if line[0] in " +"),
        )
