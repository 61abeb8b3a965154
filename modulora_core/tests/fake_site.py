"""A folder like site-packages, for tests of discovery: real modules and dist-info folders."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

HOOK = """
from modulora_core import QuantizerSpec, hookimpl

SPECS = [{specs}]

@hookimpl
def modulora_quantizers():
    return SPECS
"""

QUANTIZER = """
from pydantic import BaseModel, ConfigDict, Field, field_validator
from modulora_core import Quantizer
from {module} import SPECS

class Options(BaseModel):
    model_config = ConfigDict(frozen=True)
    group_size: int = Field(64, ge=2, description="weights that share one scale")
    symmetric: bool = Field(True, description="whether zero is in the middle")

    @field_validator("group_size")
    @classmethod
    def even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("expected an even number")
        return value

class Mine(Quantizer):
    spec = SPECS[0]
    Options = Options

    def pack(self, weight, calibration=None): raise NotImplementedError
    def dequantize_tile(self, packed, rows, dtype): raise NotImplementedError
"""


def spec(name, location, *, protocol=2, **fields):
    """The source of a QuantizerSpec."""
    summary = f"{name} for tests"
    known = {
        "name": name,
        "summary": summary,
        "location": location,
        "protocol": protocol,
        "bits": (5,),
    }
    return f"QuantizerSpec(**{known | fields!r})"


@dataclass
class FakeSite:
    """Install fake distributions into ``path``."""

    path: Path

    def install(self, distribution, entry_points, modules, *, version="1.0", group="modulora"):
        """Write a dist-info folder and modules (name to source)."""
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"{name} = {value}" for name, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        for name, source in modules.items():
            file = self.path.joinpath(*name.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(dedent(source))

    def install_quantizer(self, name, *, distribution, module, version="1.0", protocol=2):
        """Install a plugin with one quantizer, in two modules: the hook's and the class's."""
        hook = HOOK.format(specs=spec(name, f"{module}_quantizer:Mine", protocol=protocol))
        modules = {module: hook, f"{module}_quantizer": QUANTIZER.format(module=module)}
        self.install(distribution, {name: module}, modules, version=version)

    def run(self, code, **environment):
        """Run Python code in a process that has these distributions installed."""
        path = os.pathsep.join([str(self.path), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, "-c", dedent(code)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
            timeout=600,
        )


def failing(reason):
    """The source of a module that fails to import."""
    return "raise RuntimeError(" + repr(reason) + ")\n"
