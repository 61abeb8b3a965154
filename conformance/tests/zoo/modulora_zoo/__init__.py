"""Quantizers for the kit's own tests: a healthy one, and many broken on purpose. Metadata only, no torch.

Each broken one is named after its bug, and is in the module of the level that must find it.
"""

from __future__ import annotations

import re

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import Promise, QuantizerSpec

SOUND = ("Healthy", "InTriton", "StridedTiles")
"""Those that nothing is wrong with."""

PROMISE = Promise(
    bits_per_weight=6.0, gaussian=0.11, heavy_tailed=0.13, outlier_columns=0.16, constant=0.001
)

MEMBERS: dict[str, tuple[str, ...]] = {
    "healthy": ("Healthy",),
    "identity": (
        "FutureProtocol", "Unlisted", "HeavyMetadata", "SlowMetadata", "UndescribedOption", "ThawedOptions", "LaxOptions",
        "ForgetfulOptions", "UnkeptPromise", "AnyShape", "WordsStayWords",
    ),
    "packing": (
        "OtherFormat", "StochasticRounding", "ClampsItsInput", "KeepsItsInput", "Float64Scales", "IgnoresStrides",
        "PacksNaN", "LayoutWithoutScales", "TupleInMetadata", "HiddenStorage", "CodesInWords", "TransposedScale", "ZeroOffByOne",
        "SignOfOneBit", "TruncatedScale", "SecretlyCalibrated", "NeverCalibrated", "UndampedInverse",
        "RefusesShapes", "SeedsTheProcess", "NarrowerThanItSays", "WiderThanItSays", "ForgetsItsSeed",
    ),
    "tiles": (
        "TileSeam", "EvenStarts", "UncheckedRows", "EmptyIsFlat", "HalvesInBfloat16", "WholeForATile", "SharedScratch", "KeepsShortTiles",
        "CountsItsReads", "StateOfTheInstance", "LosesTheLastBlock", "AmbiguousReshape", "TwoBugsInOne", "StridedTiles",
    ),
    "lookups": ("BytesAreAMask", "IdsFromTheEnd", "RowsWithAGraph", "DecodesTheTable"),
    "products": (
        "WritesToItsInput", "StaleBufferByShape", "FewRowsWithoutZero", "BackwardWithoutZero", "WrongLastBlock", "AdjointOfAnother",
        "FlatOutput", "NoZeroRows", "InputInMemoryOrder", "OverflowsInHalf", "CutsMisfits", "SharedOutput",
        "DropsTheLastTile", "CountsItsProducts", "SeedsEveryProduct", "WrongByMuch",
    ),
    "gradients": (
        "DropsTheBias", "OtherKernelInBackward", "ScalesThatTrain", "ResultWithAGraph", "KeepsDecodedCodes", "RemembersTheLastWeight",
        "ScratchOfInference",
    ),
    "memory": ("PaddedOutput", "DenseProduct", "KeepsTheLastWhole", "LeaksALittle"),
    "devices": ("InTriton", "TritonWithoutMask"),
    "persistence": (
        "SharesMemory", "TableOfThisProcess", "ReadsAnyFormat", "Unpickles", "SeedOfThisProcess", "HashOfItsName", "SignsByGroupSize",
    ),
}  # fmt: skip
"""Module → classes. ``tests/test_zoo.py`` fails for one that is in a module and not here."""

ELSEWHERE = ("Unlisted", "HeavyMetadata", "SlowMetadata")
"""Those that this module's hook doesn't list: none does, or ``zoo_heavy.py`` and ``zoo_slow.py`` do."""

CALIBRATED = {
    "SecretlyCalibrated": "none",
    "NeverCalibrated": "required",
    "UndampedInverse": "optional",
}


def kebab(name: str) -> str:
    """``TileSeam`` is ``zoo-tile-seam``."""
    return "zoo" + re.sub(r"[A-Z]", lambda m: "-" + m[0].lower(), re.sub(r"NaN", "Nan", name))


def spec(module: str, cls: str) -> QuantizerSpec:
    more = {"UnkeptPromise": {"width": 3}, "WordsStayWords": {"group_size": 32}}
    promises = (PROMISE, PROMISE.model_copy(update={"options": more[cls]})) if cls in more else (PROMISE,)
    return QuantizerSpec(
        name=kebab(cls),
        summary=f"for the kit's own tests: {cls}",
        location=f"modulora_zoo.{module}:{cls}",
        protocol=99 if cls == "FutureProtocol" else 1,
        bits={"NarrowerThanItSays": (2,), "WiderThanItSays": (8,)}.get(cls, (4,)),
        devices=("cpu", "cuda") if module == "devices" else ("cpu",),
        in_multiple=2,
        calibration=CALIBRATED.get(cls, "none"),  # type: ignore[arg-type]
        promises=() if cls == "ForgetsItsSeed" else promises,
    )


SPECS = {cls: spec(module, cls) for module, classes in MEMBERS.items() for cls in classes}


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return [spec for cls, spec in SPECS.items() if cls not in ELSEWHERE]
