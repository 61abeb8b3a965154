"""Write an adapter as a LoRA file of llama.cpp, for the GGUF file that it will be loaded on.

::

    general.type = "adapter"          <tensor of the base>.lora_a    [r, in]    F32
    adapter.type = "lora"             <tensor of the base>.lora_b    [out, r]   F32
    adapter.lora.alpha                llama.cpp scales B A by alpha / r

Beside ``lora.gguf`` it writes ``lora.Modelfile``, with which Ollama makes a model of both files.

Experts have [experts, r, in] and [experts, out, r]. llama.cpp orders the rows of some weights in
its own way: :mod:`modulora_gguf.file.rows`. Gates and ups that are fused in memory are two
tensors of the base. Both get the same A, and each its rows of B.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modulora_core.checkpoints.foreign.foreign_checkpoint import ForeignCheckpoint
from modulora_core.checkpoints.foreign.writers import AdapterFile
from modulora_core.checkpoints.opening import open_model
from modulora_core.checkpoints.outputs import new_file, write_file
from modulora_core.errors import AdapterError, ModelError, OutputError
from modulora_core.hf.expert_format import stacks_of
from modulora_core.hf.peft_format import AdapterDelta, read_adapter
from modulora_core.models.locate import names_file
from modulora_core.models.source import ModelSource
from modulora_gguf.file.rows import Place, places, store_of


def write_lora_file(adapter: str, out: str | Path, *, model: str | None = None) -> AdapterFile:
    """Write ``adapter`` to the file ``out``, which llama.cpp loads with ``--lora``.

    The file for Ollama beside it has the name of ``out`` with the suffix ``.Modelfile``. Arguments
    and errors are those of
    :meth:`~modulora_core.checkpoints.foreign.writers.FileWriter.write_adapter`.
    """
    out = Path(out)
    check_modelfile(out)
    with new_file(out, ".gguf") as path:
        written, base = _export(adapter, out, path, model)
    write_file(out.with_suffix(".Modelfile"), _modelfile(out, base))
    return written


def check_modelfile(out: Path) -> None:
    """Raise OutputError if the file for Ollama beside ``out`` exists."""
    modelfile = out.with_suffix(".Modelfile")
    if modelfile.exists():
        raise OutputError(
            f"{modelfile}: expected a new file beside {out.name}, got a file that exists; choose "
            "another name or remove it"
        )


def _modelfile(out: Path, base: Path) -> str:
    """The lines that Ollama needs; a path without a folder is beside the Modelfile."""
    beside = base.resolve().parent == out.resolve().parent
    return (
        f"# ollama create NAME -f {out.with_suffix('.Modelfile').name}\n"
        f"FROM {f'./{base.name}' if beside else base.resolve()}\n"
        f"ADAPTER ./{out.name}\n"
    )


def _export(adapter: str, out: Path, path: Path, model: str | None) -> tuple[AdapterFile, Path]:
    """Write the LoRA file to ``path``; give the result, and the base's file."""
    from gguf import GGUFWriter

    saved = read_adapter(adapter)
    if saved.has_channel_scales:
        raise AdapterError(
            f"adapter {adapter}: expected A and B only, got channel scales, which llama.cpp "
            "doesn't know; write the dense model with both by `modulora merge`"
        )
    base = model or saved.base_name
    if not names_file(base):
        raise AdapterError(
            f"adapter {adapter}: expected a GGUF file as the base that llama.cpp loads it on, got "
            f"{base}; name one with --model FILE.gguf"
        )
    if model is None and not (base.startswith("package:") or Path(base).is_file()):
        raise AdapterError(
            f"adapter {adapter}: expected its base {base}, got no such file; say where it is: "
            f"--model FOLDER/{Path(base).name}"
        )
    found = open_model(base)
    source = found.source if isinstance(found, ForeignCheckpoint) else found
    assert isinstance(source, ModelSource)  # a file is no folder of ours
    stacks = stacks_of(found.outline) if isinstance(found, ForeignCheckpoint) else {}
    saved = read_adapter(adapter, stacks)  # again: A and B of experts, now that they are known
    alphas = (delta.scale * delta.rank for delta in saved.deltas.values())
    alpha = next(filter(None, alphas), 1.0)  # llama.cpp scales by 1 if it is 0; B is then 0
    tensors = {
        f"{name}.{factor}": tensor
        for module, delta in saved.deltas.items()
        for name, A, B in _in_file(source, module, delta, alpha)
        for factor, tensor in (("lora_a", A), ("lora_b", B))
    }
    header = store_of(source).header
    writer = GGUFWriter(path, header.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    modelfile = str(out.with_suffix(".Modelfile"))
    result = AdapterFile(str(out), base, header.architecture, len(saved.deltas), (modelfile,))
    return result, header.path


def _in_file(
    source: ModelSource, module: str, delta: AdapterDelta, alpha: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of each of the base's tensors, A, and its rows of B in the file's order."""
    parameter = module if delta.A.dim() == 3 else f"{module}.weight"
    try:
        found = places(source, parameter)
    except ModelError as error:
        raise AdapterError(f"{error}; llama.cpp can't load this adapter there") from None
    rows = sum(len(place.rows) for place in found)
    B = delta.B.float().flatten(0, -2) * (delta.scale * delta.rank / alpha)  # [experts · out, r]
    for place in found:
        if rows != len(B) or not _fits(place, delta):
            raise AdapterError(
                f"{module}: expected an adapter of {list(place.shape)} for {place.name} of "
                f"{source.location.name}, got {list(delta.shape)}"
            )
        B_rows = B[place.rows].view(*place.shape[:-1], delta.rank)
        yield place.name, delta.A.float().contiguous(), B_rows.contiguous()


def _fits(place: Place, delta: AdapterDelta) -> bool:
    """Whether a tensor has rows of the adapter's length, and all experts in their order."""
    *experts, out_features, in_features = delta.shape
    if place.shape[-1] != in_features or place.shape[:-2] != tuple(experts):
        return False
    expert = place.rows.view(*place.shape[:-1]) // out_features
    return not experts or torch.equal(expert, torch.arange(len(expert))[:, None].expand_as(expert))
