"""L2: channel scales are multiplied into a packed weight."""

from __future__ import annotations

import pytest
import torch

from modulora_conformance.cases import generator, packed, tile
from modulora_conformance.changes import check_same_bytes, clone
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.tiles import RANGES
from modulora_conformance.oracle import relative_error
from modulora_conformance.results import NOT_OFFERED, Measurements
from modulora_conformance.tolerances import ROUNDING
from modulora_core.errors import PluginError
from modulora_core.spec import Quantizer


class Rescaled(Level):
    """`rescaled` gives diag(v) Ŵ diag(u), if the spec offers it."""

    level, title = "L2", "tiles"

    @needs(RANGES)
    def test_a_rescaled_weight_is_scaled_on_both_sides(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: `rescaled` gives another weight than diag(v) Ŵ diag(u), or changes Ŵ.

        Multiply u [in] and v [out] into copies of the vectors. Tuning calls it again on the result.
        Without `rescales=True` in the spec, inherit it.
        """
        weight = packed(quantizer, (40, 96))
        draw = generator(50)
        v, u = (1 + 0.2 * torch.rand(n, generator=draw) for n in weight.shape)
        if not quantizer.spec.rescales:
            with pytest.raises(PluginError):
                quantizer.rescaled(weight, u, v)
            pytest.skip(f"{NOT_OFFERED}spec.rescales is false")
        before, W = clone(weight), tile(quantizer, weight)
        once = quantizer.rescaled(weight, u, v)
        twice = quantizer.rescaled(once, 1 / u, 1 / v)
        check_same_bytes(before, weight, "the packed weight after rescaling it")
        limit = 4 * ROUNDING[torch.float16].value  # two vectors in fp16, twice
        for name, found, exact in (("once", once, v[:, None] * W * u), ("and back", twice, W)):
            assert found.layout == weight.layout, (
                f"rescaled {name}: expected the layout {weight.layout}, got {found.layout}"
            )
            error = relative_error(tile(quantizer, found), exact)
            measurements.at_most(f"a weight rescaled {name}", error, limit)
