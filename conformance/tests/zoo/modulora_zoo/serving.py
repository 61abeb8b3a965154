"""Sound and broken for a server: level 8 finds them."""

import torch

from modulora_zoo.healthy import Healthy


class Slicing(Healthy):
    """Sound: any rows, and no columns."""

    def sliced(self, packed, dim, start, stop):
        if dim:
            return None
        shape = (stop - start, packed.shape[1])
        return self.layout(shape).fill({n: t[start:stop] for n, t in packed.tensors.items()})


class SlicesFromTheFirstRow(Slicing):
    breaks = "test_a_sliced_weight_is_its_part"
    says = "not the bits of"

    def sliced(self, packed, dim, start, stop):
        return super().sliced(packed, dim, 0, stop - start)


class SlicesFromAMultipleOfEight(Slicing):
    """It grants cuts within its blocks."""

    breaks = "test_any_part_of_any_weight_is_exact_or_refused"
    says = "not the bits of"

    def sliced(self, packed, dim, start, stop):
        if start in (1, 3):  # which fixed cuts meet
            return super().sliced(packed, dim, start, stop)
        return super().sliced(packed, dim, start - start % 8, stop - start % 8)


class ReadsHalvesInMemoryOrder(Healthy):
    breaks = "test_batches_of_a_server_are_multiplied"
    says = "a part of a joined output"

    def matmul(self, x, packed, transpose=False):
        if (
            x.dtype == torch.float16
            and x.dim() == 2
            and x.stride(-1) == 1
            and x.device.type == "cpu"
        ):
            x = x.as_strided(x.shape, (x.shape[1], 1))
        return super().matmul(x, packed, transpose)


class Recorded(Healthy):
    """Sound: capturable, with a table in a cache."""


class CopiesItsTable(Healthy):
    """It makes a table from Python's numbers for each product."""

    breaks = "test_a_product_can_be_recorded_in_a_graph"
    says = "copies from the host"

    def decode(self, packed, rows):
        table = torch.tensor([1.0], dtype=torch.float32, device=packed.device)
        return super().decode(packed, rows) * table


class ReadsAScale(Healthy):
    breaks = "test_a_product_can_be_recorded_in_a_graph"
    says = "reads values"

    def decode(self, packed, rows):
        found = super().decode(packed, rows)
        if packed.device.type == "cuda" and bool(found.isnan().any()):
            found = found.nan_to_num()
        return found
