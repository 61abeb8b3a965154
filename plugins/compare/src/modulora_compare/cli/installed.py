"""Choose among the installed quantizers that need no calibration."""

from __future__ import annotations

from modulora_core.errors import UnknownQuantizerError
from modulora_core.registry import entries

EMBEDDING_BITS = 8.0
"""Half of the weights of a small model are its embedding, so it is packed too, with little loss."""


def smallest_quantizer() -> str:
    """The quantizer with the fewest bits. Raises UnknownQuantizerError if there is none."""
    bits = _without_calibration()
    if not bits:
        raise UnknownQuantizerError(
            "demo: expected an installed quantizer that needs no calibration, found none; "
            "see `modulora list-quantizers`"
        )
    return min(bits, key=lambda name: (min(bits[name]), name))


def embedding_quantizer() -> str | None:
    """The first quantizer of EMBEDDING_BITS, for an embedding; or None."""
    found = (name for name, bits in _without_calibration().items() if EMBEDDING_BITS in bits)
    return next(found, None)


def _without_calibration() -> dict[str, tuple[float, ...]]:
    """The bits of each quantizer by name."""
    specs = [entry.spec for entry in entries() if entry.status == "ok" and entry.spec is not None]
    return {spec.name: spec.bits for spec in specs if spec.calibration == "none"}
