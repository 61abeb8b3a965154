"""L2: quantizers that cut a packed weight for tensor parallelism, and one that does it right."""

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
