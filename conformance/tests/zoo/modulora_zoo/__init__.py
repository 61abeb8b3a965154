"""Quantizers for the kit's own tests: sound ones, and many broken on purpose. Metadata only.

A broken quantizer is named after its fault, and stands in the module of the level that must find
it. Its attribute ``breaks`` names the check that must fail; ``says`` is a part of the message."""

import ast
import re
from pathlib import Path

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SOUND = (
    "Healthy", "InTriton", "StridedTiles", "Sound", "PerRow", "Floating", "Lattice", "Rotated",
    "Importance", "OwnFunction", "Scaled", "Experts", "RotatedKernels", "Microscaled",
    "Snapping", "Rounding", "Slicing", "Recorded", "Branching",
)  # fmt: skip

UNMET = ("Hidden",)
"""The checks meet none of its mistakes. The count of branches names them."""

ELSEWHERE = ("Unlisted", "HeavyMetadata", "SlowMetadata")
"""This module's hook does not list them: zoo_heavy.py and zoo_slow.py do, or no module."""

PROMISE = Promise(
    bits_per_weight=6.0, gaussian=0.11, heavy_tailed=0.13, outlier_columns=0.16, constant=0.001
)

OF_8_BITS = Promise(
    bits_per_weight=8.1, gaussian=0.03, heavy_tailed=0.06, outlier_columns=0.08, constant=0.03
)

OF_4_BIT_FLOATS = Promise(
    bits_per_weight=4.25, gaussian=0.12, heavy_tailed=0.15, outlier_columns=0.18, constant=0.18
)


CALIBRATED = (
    "Importance", "InvertedImportance", "ReversedImportance", "FirstImportance", "SaysItIgnores",
    "IgnoresItsCalibration", "KeepsItsCalibration", "SecondMomentByAddress",
    "UndeclaredGradients", "IgnoredGradients", "WorseByGradients", "CoarseFrom3000Samples",
    "DampsByANumber", "TellsPercents",
)  # fmt: skip

BITS = {"NarrowerThanItSays": (2,), "WiderThanItSays": (8,), "Microscaled": (4,)}

RESCALING = ("Scaled", "ScalesInPlace", "ReplacesItsScales", "DividesByScales")

HERE = Path(__file__).parent


def names(file):
    """The public classes of a module, without importing it."""
    nodes = ast.parse(file.read_text()).body
    return [n.name for n in nodes if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]


def spec(module, cls):
    kebab = re.sub("[A-Z]", lambda m: "-" + m[0].lower(), cls.replace("NaN", "Nan"))
    options = {"UnkeptPromise": {"width": 3}, "WordsStayWords": {"group_size": 32}}.get(cls)
    promises = [PROMISE] + ([PROMISE.model_copy(update={"options": options})] if options else [])
    promises = [OF_8_BITS] if module == "sound" else promises
    promises = [OF_4_BIT_FLOATS] if cls == "Microscaled" else promises
    calibration = {"NeverCalibrated": "required", "UndampedInverse": "optional"}
    calibration |= dict.fromkeys(CALIBRATED, "optional")
    return QuantizerSpec(
        name=f"zoo{kebab}",
        summary=f"for the kit's own tests: {cls}",
        location=f"modulora_zoo.{module}:{cls}",
        protocol=99 if cls == "FutureProtocol" else 2,
        bits=BITS.get(cls, (8,) if module == "sound" else (4,)),
        devices=("cpu", "cuda") if module == "devices" else ("cpu",),
        in_multiple=2,
        calibration=calibration.get(cls, "none"),
        output_hessian=cls in ("IgnoredGradients", "WorseByGradients"),
        rescales=cls in RESCALING,
        capturable=cls in ("Recorded", "CopiesItsTable", "ReadsAScale"),
        promises=() if cls == "ForgetsItsSeed" else tuple(promises),
    )


FILES = [f for f in sorted(HERE.glob("[a-z]*.py")) if f.stem != "triton_kernels"]
SPECS = {cls: spec(file.stem, cls) for file in FILES for cls in names(file)}


@hookimpl
def modulora_quantizers():
    return [found for cls, found in SPECS.items() if cls not in ELSEWHERE]
