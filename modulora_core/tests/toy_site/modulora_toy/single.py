"""An invented format of whole models in one file: safetensors, with the config as metadata.

A packed weight ``NAME`` is ``NAME.codes`` and ``NAME.scale``; other tensors are dense.
"""

import json
import time
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modulora_core.checkpoints.foreign.writers import AdapterFile, FileWriter, MergedFile
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import new_file
from modulora_core.checkpoints.record import PackedSite
from modulora_core.hf.load_adapter import adapter_for
from modulora_core.hf.merge import delta_of, merged_parameter
from modulora_core.hf.peft_format import read_adapter
from modulora_core.models.formats import ForeignWeight, ModelFile, PackedTensors
from modulora_core.models.store import StoredTensor
from modulora_toy.quantizer import Toy


class SingleFile(ModelFile):
    def __init__(self, path):
        from transformers import AutoConfig

        self.path, self.toy, self.dtype = path, Toy(), torch.float32
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["config"])
            names = list(file.keys())
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        self.config = AutoConfig.for_model(**values)
        self.description = {"config": values}

    def tokenizer(self):
        from modulora_core.tests.tiny_tokenizer import make_tokenizer

        return make_tokenizer()  # the file has none

    def tensors(self, model):
        return Dense(self.path, self.shapes, self.toy)

    def packed(self, source, sites):
        weights = {site.name: self.weight(site.name) for site in sites if self.is_packed(site.name)}
        return PackedTensors(weights, Parts(self.path))

    def is_packed(self, name):
        return f"{name}.codes" in self.shapes

    def weight(self, name):
        layout = self.toy.layout(self.shapes[f"{name}.codes"])

        def unpack(read):
            return layout.fill({part: read(f"{name}.{part}") for part in ("codes", "scale")})

        return ForeignWeight((f"{name}.codes", f"{name}.scale"), self.toy, layout, unpack)


class Parts:
    """The tensors as they are in the file."""

    def __init__(self, path):
        self.path = path

    def read(self, name):
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def read_part(self, name, index):
        raise AssertionError(f"{name}: no stacks here")


class Dense(Parts):
    """The tensors by their names in memory; codes are multiplied out."""

    def __init__(self, path, shapes, toy):
        super().__init__(path)
        names = {name.removesuffix(".codes"): shape for name, shape in shapes.items()}
        self.tensors = {
            name: StoredTensor(shape, torch.float32, "F32", 0, path.name)
            for name, shape in names.items()
            if not name.endswith(".scale")
        }
        self.packed = {name for name in names if f"{name}.codes" in shapes}

    def read(self, name):
        read = super().read
        if name not in self.packed:
            return read(name)
        return read(f"{name}.codes").float() * read(f"{name}.scale")


class SingleWriter(FileWriter):
    default_type = "toy"

    def write_adapter(self, adapter, out, *, model=None):
        saved = read_adapter(adapter)
        with new_file(Path(out), self.spec.file_suffix) as path:
            factors = {
                f"{module}.{factor}": getattr(delta, factor).contiguous()
                for module, delta in saved.deltas.items()
                for factor in ("A", "B")
            }
            save_file(factors, path)
        return AdapterFile(str(out), str(model or saved.base_name), "toy", len(saved.deltas))

    def merge(self, model, out, *, adapter=None, type=None, base=None, progress=True):
        started, checkpoint = time.perf_counter(), open_packed(model)
        deltas = {} if adapter is None else adapter_for(checkpoint, adapter).deltas
        merged = partial(merged_parameter, checkpoint, dtype=torch.float32)
        tensors = {}
        for name, stored in checkpoint.parameters.items():
            value = merged(name, delta_of(checkpoint, name, deltas))
            if isinstance(stored, PackedSite) and type != "float32":
                packed = Toy().pack(value).tensors
                tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
            else:
                tensors[name] = value
        with new_file(out, self.spec.file_suffix) as path:
            write(path, checkpoint.config, tensors)
        seconds, nbytes = time.perf_counter() - started, sum(t.nbytes for t in tensors.values())
        return MergedFile(
            str(out), checkpoint.name, {"toy": len(tensors)}, nbytes, len(deltas), seconds, 0, {}
        )


def write(path, config, tensors):
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    save_file(tensors, path, metadata={"config": json.dumps(config)})
