"""What the tests of mixed precision share: a model whose layers differ, choices, runs, and runs that are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.shards import ShardWriter
from modulora_core.models import open_model
from modulora_core.quantization.mixed import errors
from modulora_core.quantization.quantize import Budget, QuantizeResult, quantize
from modulora_core.registry import Choice
from modulora_core.tests.scaled_quantizer import save_model_with_tokenizer

CONFIG = CalibrationConfig("pydoc[:20%]", samples=16, seq_len=32)
CHOICES = tuple(
    map(Choice.parse, ("heeding:bits=2", "plain:bits=4", "heeding:bits=4", "plain:bits=8"))
)


def save_uneven_llama(folder: Path, family: str = "llama") -> str:
    """A model whose layers matter differently, as those of a trained one do, and those of a random one hardly."""
    save_model_with_tokenizer(family, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("0.mlp.down_proj.weight", "1.self_attn.o_proj.weight")):
            tensor *= 4
        if name.endswith(("1.mlp.down_proj.weight", "0.self_attn.o_proj.weight")):
            tensor /= 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def uniform_size(source: str, bits: int) -> int:
    """Bytes of a checkpoint of that width, by arithmetic: codes, an fp16 scale for each row, and fp32 for the rest."""
    packed = [
        info
        for name, info in open_model(source).parameters.items()
        if name.endswith("_proj.weight")
    ]
    kept = sum(
        info.nbytes
        for name, info in open_model(source).parameters.items()
        if not name.endswith("_proj.weight")
    )
    return kept + sum(info.numel * bits // 8 + 2 * info.shape[0] for info in packed)


def run(source: str, out: Path, budget: int, **arguments: Any) -> QuantizeResult:
    choices = arguments.pop("choices", CHOICES)
    return quantize(
        source, out, Budget(budget, choices), **{"calibration": CONFIG, "seed": 1, **arguments}
    )


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


def stop(source: str, out: Path, budget: int, after: int, **arguments: Any) -> None:
    """A run that ends before its next layer is measured or parameter written, after so many were."""
    count = 0

    def dying(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > after:
                raise Killed
            return call(*arguments)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "write", dying(ShardWriter.write))
        patch.setattr(errors._Measuring, "pack", dying(errors._Measuring.pack))
        with pytest.raises(Killed):
            run(source, out, budget, resume=True, **arguments)
