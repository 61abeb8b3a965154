#!/usr/bin/env python3
"""List sentences that may be hard to read, in Markdown, docstrings and comments.

It is advice: a script cannot hear a hard sentence, so the exit code is always 0.

A sentence has at most 25 words, does not begin with a word of FIRST, and has no phrase of PHRASES.
A line has at most 100 columns. Code, tables and formulas are left out.

    python .ci/prose.py            every tracked file
    python .ci/prose.py PATH...    these files and folders
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

LONGEST_SENTENCE, LONGEST_LINE = 25, 100
FIRST = re.compile(r"(what|where|these|those)\b", re.IGNORECASE)
PHRASES = re.compile(
    r"\b(as ever|(is|are|was|were) told|tells? what|stands? for|stands? in the place of|"
    r"that of the|those of|what is|what was|isn't kept|one that|all that|it is that)\b",
    re.IGNORECASE,
)
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|et al|Eq|Fig|Sec|No)\.")
DIRECTIVE = re.compile(r"^#+!?\s*(noqa|type: ignore|fmt|pragma)\S*( \w+\d+,?)*\s*#?")
SKIPPED = ("CHANGELOG.md", "LICENSE")

Block = tuple[int, str]
"""The line where a paragraph begins, and its text in one line."""


def main(arguments: list[str]) -> int:
    found = [f"{path}:{line}: {fault}" for path in files(arguments) for line, fault in faults(path)]
    print("\n".join([*found, f"{len(found)} sentences or lines to look at"]))
    return 0


def files(arguments: list[str]) -> Iterator[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *arguments]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ):
        path = Path(name)
        if path.suffix in (".md", ".py") and path.is_file() and path.name not in SKIPPED:
            yield path


def faults(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    blocks = markdown(text) if path.suffix == ".md" else python(text)
    for line, block in blocks:
        for sentence in sentences(block):
            for fault in faults_of(sentence):
                yield line, f"{fault}: {sentence[:160]}"
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > LONGEST_LINE and not line.lstrip().startswith("|") and " " in line.strip():
            yield number, f"{len(line)} columns"


def faults_of(sentence: str) -> Iterator[str]:
    words = [word for word in sentence.split() if re.search(r"\w", word)]
    if len(words) > LONGEST_SENTENCE:
        yield f"{len(words)} words"
    if FIRST.match(sentence) and not sentence.endswith("?"):
        yield f"begins with {sentence.split()[0]}"
    if phrase := PHRASES.search(sentence):
        yield f"has {phrase[0]!r}"


def sentences(block: str) -> Iterator[str]:
    block = re.sub(r"(``.+?``|`[^`]+`|\[[^\]]*\]\([^)]*\)|:\w+:`[^`]+`)", _one_word, block)
    block = ABBREVIATIONS.sub(r"\1", block)
    for sentence in re.split(r"(?<=[.!?])[\")]?\s+(?=[^a-z])", block):
        if sentence.strip():
            yield sentence.strip()


def _one_word(match: re.Match[str]) -> str:
    return re.sub(r"\s+", "_", match[0])


def markdown(text: str) -> Iterator[Block]:
    """Paragraphs, headings and list items."""
    start, lines, fenced = 0, list[str](), False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
            line = ""
        item = re.match(r"\s*([-*+]|\d+\.|#+|>|===?)\s+", line)
        ends = fenced or not line.strip() or line.lstrip().startswith(("|", "<", "$$")) or item
        if ends and lines:
            yield start, " ".join(lines)
            lines = []
        if fenced or (ends and not item) or (not lines and line.startswith("    ")):
            continue
        start = start if lines else number
        lines.append(line[item.end() :].strip() if item else line.strip())


def python(text: str) -> Iterator[Block]:
    for node in ast.walk(ast.parse(text)):
        for child in (
            getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []
        ):
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield from docstring(value.lineno, value.value)
    yield from comments(text)


def docstring(line: int, text: str) -> Iterator[Block]:
    """Paragraphs and entries of ``Args:`` sections; other indented blocks are formulas or code."""
    first, _, rest = text.partition("\n")
    lines = [first, *textwrap.dedent(rest).split("\n")]
    start, paragraph, section = line, list[str](), False
    for number, content in enumerate([*lines, ""], line):
        heading = re.fullmatch(
            r"(Args|Returns|Raises|Attributes|Yields|Returned):", content.strip()
        )
        indent = len(content) - len(content.lstrip())
        entry = section and re.match(r"    [\w*, .\[\]`]+: ", content)
        if (heading or not content.strip() or entry) and paragraph:
            yield start, " ".join(paragraph)
            paragraph = []
        section = bool(heading) or (section and (indent > 0 or not content.strip()))
        formula = (indent >= 4 and not section) or "   " in content.strip()
        if heading or not content.strip() or formula:
            continue
        start = start if paragraph else number
        paragraph.append(content[entry.end() :].strip() if entry else content.strip())


def comments(text: str) -> Iterator[Block]:
    """Comments; lines of their own that follow each other are one. Directives for tools go."""
    start, last, lines = 0, -1, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        content = DIRECTIVE.sub("", token.string).lstrip("#").strip()
        alone = token.line.strip().startswith("#")
        if lines and (not alone or token.start[0] != last + 1):
            yield start, " ".join(lines)
            lines = []
        if not alone:
            yield token.start[0], content
            continue
        start, last = (start if lines else token.start[0]), token.start[0]
        if "   " not in content:
            lines.append(content)
    if lines:
        yield start, " ".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
