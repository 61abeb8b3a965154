"""The flags of a run of the kit, each declared once.

``modulora conformance`` and pytest have the same flags, pytest with longer names. The command turns
its own into pytest's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HIGHEST = 7
"""The number of the last level."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of both.

    Attributes:
        words: of the command: the flags and the value's name, ``"--level N"``.
        of_pytest: its name among pytest's options.
        help: one sentence.
    """

    words: str
    of_pytest: str
    help: str

    def for_command(self, **more: Any) -> Any:
        """The declaration for a command; ``more`` are arguments of ``typer.Option``."""
        from modulora_core.cli.arguments import option  # pytest needs no typer

        return option(self.words, self.help, **more)

    def for_pytest(self, **more: Any) -> tuple[str, dict[str, Any]]:
        """The name and the keywords for ``addoption``; ``more`` are keywords too."""
        metavar = self.words.split()[-1]
        shown = {} if metavar.startswith("-") else {"metavar": metavar}
        return self.of_pytest, {"help": self.help, **shown, **more}

    def words_of(self, value: object) -> list[str]:
        """The words for pytest that give this value; none for None, False or an empty list."""
        if isinstance(value, list):
            return [f"{self.of_pytest}={each}" for each in value]
        if value is True:
            return [self.of_pytest]
        return [] if value is None or value is False else [f"{self.of_pytest}={value}"]


QUANTIZER = Flag("NAME", "--quantizer", "A quantizer of `modulora list-quantizers`.")
OPTIONS = Flag(
    "--option -o KEY=VALUE",
    "--quantizer-option",
    "Set an option of the quantizer. Repeatable. Without it: each set that its spec promises.",
)
LEVEL = Flag("--level N", "--conformance-level", "Run the levels 0 to N.")
REPORT = Flag(
    "--report DIR",
    "--conformance-report",
    "Write NAME.html, .json, .xml (JUnit), .svg (a badge) and .md (a table) to DIR.",
)
CERTIFIED = Flag(
    "--certified",
    "--certified",
    "Fail too for expected failures, and for skips other than hardware's.",
)
GOLDEN = Flag("--golden DIR", "--golden", "Compare with the golden vectors in DIR.")
