"""Fixtures that several test files share: small quantizers that are not first-party plugins, and tiny models.

``Toy``, ``Verbatim`` and the format ``crude`` are installed as an outsider's package would be: a module and a dist-info folder on the path,
found by the real importlib.metadata.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOY_INIT = """
from modulora_core.hookspecs import hookimpl
from modulora_core.spec import FormatSpec, QuantizerSpec

CRUDE = FormatSpec(name="crude", summary="what another tool writes", location="modulora_toy.crude:Crude", quant_methods=("crude",),
                   config_files=("crude.json",))
CRUDE_2 = FormatSpec(name="crude_2", summary="the same, only written", location="modulora_toy.crude:Crude")
CRUDE_3 = FormatSpec(name="crude_3", summary="the same, only read", location="modulora_toy.crude:CrudeReader",
                     config_keys=("crude_levels",))
TOY = QuantizerSpec(name="toy", summary="Rounds each row to 8 bits", location="modulora_toy.quantizer:Toy", protocol=1, bits=(8,),
                    formats=(CRUDE, CRUDE_2, CRUDE_3))
VERBATIM = QuantizerSpec(name="verbatim", summary="Keeps fp32", location="modulora_toy.quantizer:Verbatim", protocol=1, bits=(32,))

@hookimpl
def modulora_quantizers():
    return [TOY, VERBATIM]
"""

TOY_QUANTIZER = """
import torch
from pydantic import BaseModel, ConfigDict, Field
from modulora_core.spec import PackedWeight, Quantizer, check_rows
from modulora_toy import TOY, VERBATIM

class ToyOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    levels: int = Field(127, ge=1, le=127, description="largest code")

class Toy(Quantizer):
    spec = TOY
    Options = ToyOptions

    def pack(self, weight, calibration=None):
        levels = self.options.levels
        scale = weight.float().abs().amax(dim=1, keepdim=True) / levels  # [out, 1]
        codes = (weight.float() / torch.where(scale == 0, 1, scale)).round().to(torch.int8)
        return PackedWeight("toy", 1, tuple(weight.shape), {"codes": codes, "scale": scale}, {"levels": levels})

    def dequantize_tile(self, packed, rows, dtype):
        check_rows(packed, rows)
        start, stop = rows
        return (packed.tensors["codes"][start:stop].float() * packed.tensors["scale"][start:stop]).to(dtype)

class Verbatim(Quantizer):
    spec = VERBATIM

    def pack(self, weight, calibration=None):
        return PackedWeight("verbatim", 1, tuple(weight.shape), {"values": weight.float().contiguous().clone()})

    def dequantize_tile(self, packed, rows, dtype):
        check_rows(packed, rows)
        return packed.tensors["values"][rows[0] : rows[1]].to(dtype, copy=True)
"""


TOY_FORMAT = """
from modulora_core.errors import CheckpointError, ModelError, ShapeError
from modulora_core.models.formats import CheckpointFormat, ForeignWeight, FormatReader
from modulora_core.spec import TensorLayout
from modulora_toy.quantizer import Toy, ToyOptions

class Crude(CheckpointFormat):
    # for each layer: turned, int8 [in, out], and factor, fp32 [out]

    def weights(self, config, tensors, read):
        levels = config["levels"]
        if levels > 127:
            raise ModelError(f"levels {levels}: not implemented")
        toy = Toy(ToyOptions(levels=levels))
        found = {}
        for name in tensors:
            if name.endswith(".turned"):
                module = name.removesuffix(".turned")
                shape = tensors[name].shape[::-1]
                found[module] = ForeignWeight((name, f"{module}.factor"), toy, toy.layout(shape), self.unpacker(module, toy, shape))
        return found

    def unpacker(self, module, toy, shape):
        def unpack(read):
            codes = read(f"{module}.turned").t().contiguous()
            return toy.layout(shape).fill({"codes": codes, "scale": read(f"{module}.factor")[:, None]})
        return unpack

    def plan(self, weight):
        if weight.quantizer.spec.name != "toy":
            raise ModelError(f"packed by {weight.quantizer.spec.name}; {self.spec.name} holds weights of toy only")
        out_features, in_features = weight.layout.shape
        if out_features % 4:
            raise ShapeError(f"out_features {out_features} is not a multiple of 4")
        return {"turned": TensorLayout("int8", (in_features, out_features)), "factor": TensorLayout("float32", (out_features,))}

    def tensors(self, weight):
        packed = weight.packed()
        return {"turned": packed.tensors["codes"].t().contiguous(), "factor": packed.tensors["scale"][:, 0].contiguous()}

    def config(self, weights, kept):
        return {"quant_method": "crude", "levels": weights[0].layout.metadata["levels"], "version": self.spec.name, "kept": kept}

class CrudeReader(FormatReader):
    def weights(self, config, tensors, read):
        assert config["hidden_size"] > 0  # all of config.json, and not the value of the key
        return Crude(self.spec).weights({"levels": config["crude_levels"]}, tensors, read)
"""


def install_package(
    root: Path, distribution: str, entry_point: str, package: str, files: dict[str, str]
) -> None:
    """Lay out ``package`` and its dist-info below ``root`` as pip would."""
    folder = root / package
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    info = root / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[modulora]\n{entry_point} = {package}\n")


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on the path, installs the distribution modulora-toy."""
    root = tmp_path_factory.mktemp("toy-site")
    files = {"__init__.py": TOY_INIT, "quantizer.py": TOY_QUANTIZER, "crude.py": TOY_FORMAT}
    install_package(root, "modulora-toy", "toy", "modulora_toy", files)
    return root


@pytest.fixture(scope="session")
def toy(toy_root: Path) -> Iterator[ModuleType]:
    """The module with the classes ``Toy`` and ``Verbatim``, installed as a plugin for the session."""
    sys.path.insert(0, str(toy_root))
    importlib.invalidate_caches()
    yield importlib.import_module("modulora_toy.quantizer")
    sys.path.remove(str(toy_root))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def pack(
    toy: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """``pack(architecture, quantizer)``: the folders of a tiny dense model and of its packed form, made once."""
    from modulora_core.quantization.quantize import quantize
    from modulora_core.tests.tiny_models import save_tiny_model

    made: dict[tuple[object, ...], tuple[Path, Path]] = {}

    def folders(
        architecture: str, quantizer: str = "verbatim", exclude: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        key = (architecture, quantizer, exclude)
        if key not in made:
            root = tmp_path_factory.mktemp(architecture)
            dense = save_tiny_model(architecture, root / "dense")
            quantize(str(dense), root / "packed", quantizer, exclude=exclude)
            made[key] = dense, root / "packed"
        return made[key]

    return folders


@pytest.fixture(scope="session")
def tunable(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny packed Llama that has a tokenizer, a window of 128 tokens, and its dense form beside it."""
    from modulora_core.quantization.quantize import quantize
    from modulora_core.tests.adapted_models import save_llama_with_tokenizer

    root = tmp_path_factory.mktemp("tunable")
    save_llama_with_tokenizer(root / "dense")
    quantize(str(root / "dense"), root / "packed", "toy")
    return root / "packed"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
