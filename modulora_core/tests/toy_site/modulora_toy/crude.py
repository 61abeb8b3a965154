"""An invented tool's format: per layer ``turned``, int8 [in, out], and ``factor``, fp32 [out]."""

from functools import partial
from typing import ClassVar

from modulora_core.errors import ModelError, ShapeError
from modulora_core.models.formats import CheckpointFormat, ForeignWeight, FormatReader
from modulora_core.spec import TensorLayout
from modulora_toy.quantizer import Toy, ToyOptions


class Crude(CheckpointFormat):
    # for each layer: turned, int8 [in, out], and factor, fp32 [out]

    parts: ClassVar = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def weights(self, config, tensors, read):
        levels = config["levels"]
        if levels > 127:
            raise ModelError(f"levels {levels}: not implemented")
        toy = Toy(ToyOptions(levels=levels))
        found = {}
        for name in tensors:
            if name.endswith(".turned"):
                module = name.removesuffix(".turned")
                cut = partial(self.weight, module, toy) if config.get("padded") else None
                found[module] = self.weight(module, toy, tensors[name].shape[::-1], cut)
        return found

    def weight(self, module, toy, shape, cut=None):
        out, columns = shape

        def unpack(read):
            codes = read(f"{module}.turned").t()[:out, :columns].contiguous()
            return toy.layout(shape).fill(
                {"codes": codes, "scale": read(f"{module}.factor")[:out, None]}
            )

        names = f"{module}.turned", f"{module}.factor"
        return ForeignWeight(names, toy, toy.layout(shape), unpack, cut=cut)

    def plan(self, weight):
        packed_by = weight.quantizer.spec.name
        if packed_by != "toy":
            raise ModelError(f"packed by {packed_by}; {self.spec.name} holds weights of toy only")
        out_features, in_features = weight.layout.shape
        if out_features % 4:
            raise ShapeError(f"out_features {out_features} is not a multiple of 4")
        return {
            "turned": TensorLayout("int8", (in_features, out_features)),
            "factor": TensorLayout("float32", (out_features,)),
        }

    def tensors(self, weight):
        packed = weight.packed()
        return {
            "turned": packed.tensors["codes"].t().contiguous(),
            "factor": packed.tensors["scale"][:, 0].contiguous(),
        }

    def config(self, weights, kept):
        return {
            "quant_method": "crude",
            "levels": weights[0].layout.metadata["levels"],
            "version": self.spec.name,
            "kept": kept,
        }


class CrudeReader(FormatReader):
    def weights(self, config, tensors, read):
        assert config["hidden_size"] > 0  # all of config.json, and not the value of the key
        return Crude(self.spec).weights({"levels": config["crude_levels"]}, tensors, read)
