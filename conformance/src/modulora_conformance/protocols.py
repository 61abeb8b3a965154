"""Tells the author of an older plugin each change up to the protocol that the core speaks."""

from __future__ import annotations

from dataclasses import dataclass

from modulora_core.spec import PROTOCOL


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the contract.

    Attributes:
        protocol: the first one with it.
        advice: a sentence without a full stop for the author.
        signs: words in the error of a plugin that lacks the change.
    """

    protocol: int
    advice: str
    signs: tuple[str, ...] = ()


CHANGES = (
    Change(
        2,
        "return the FormatSpecs from the hook modulora_formats, each with protocol=2, and leave "
        "`formats` out of QuantizerSpec; FormatSpec is in modulora_core.hookspecs",
        ("formats: Extra inputs", "import name 'FormatSpec'"),
    ),
    Change(
        2,
        "import kernels and their helpers from modulora_kernels instead of modulora_core.kernels, "
        "and require modulora-kernels in pyproject.toml",
        ("modulora_core.kernels", "modulora_kernels"),
    ),
    Change(
        2,
        "write `import modulora_core.hf` where tests or scripts load models by transformers; "
        "`import modulora_core` no longer registers our format",
        ("import name 'ModuLoRAConfig'",),
    ),
    Change(2, "write protocol=2 in QuantizerSpec, and run the kit again"),
)


def changes_since(protocol: int) -> list[str]:
    """The changes to make in a plugin of an older protocol, in order; none for today's."""
    return [each.advice for each in CHANGES if protocol < each.protocol <= PROTOCOL]


def advice_on(fault: str) -> str | None:
    """The change to make if the error of a broken plugin comes of its age; else None."""
    for each in CHANGES:
        if any(sign in fault for sign in each.signs):
            return f"since protocol {each.protocol}: {each.advice}"
    return None
