"""Write an adapter as a LoRA file of llama.cpp, for the GGUF file that it will be loaded on.

::

    general.type = "adapter"          <tensor of the base>.lora_a    [r, in]    F32
    adapter.type = "lora"             <tensor of the base>.lora_b    [out, r]   F32
    adapter.lora.alpha                llama.cpp scales B A by alpha / r

llama.cpp orders the rows of some weights in its own way, such as Llama's q and k. The base says
where each row is: transformers' conversion of the file is run on row numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modulora_core.adapters.peft_format import AdapterDelta, read_adapter
from modulora_core.errors import AdapterError, OutputError
from modulora_core.models.gguf_store import GGUFStore
from modulora_core.models.source import ModelSource, open_model


@dataclass(frozen=True, slots=True)
class LoRAFileResult:
    """The file that was written; ``modules`` is the number of adapted weights."""

    out: str
    base: str
    architecture: str
    modules: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export_for_llama_cpp(
    adapter: str, out: str | Path, *, model: str | None = None
) -> LoRAFileResult:
    """Write ``adapter`` to the file ``out``, which llama.cpp loads with ``--lora``.

    Args:
        adapter: a LoRA adapter in PEFT's format, a folder or Hub id.
        out: a new file, ``*.gguf``.
        model: the GGUF file that llama.cpp runs, or ``package:NAME``; by default the base that the
            adapter names.

    Raises:
        OutputError: ``out`` exists, or isn't called ``*.gguf``.
        AdapterError: it does not fit the model, or has channel scales or experts.
        RequestError: the model isn't a GGUF file, or can't be read.
    """
    from gguf import GGUFWriter

    out = Path(out)
    if out.suffix.lower() != ".gguf" or out.exists() or not out.parent.is_dir():
        raise OutputError(f"{out}: expected a new file called *.gguf in a folder that exists")
    saved = read_adapter(adapter)
    if saved.has_channel_scales:
        raise AdapterError(
            f"adapter {adapter}: expected A and B only, got channel scales, which llama.cpp "
            "doesn't know; write the dense model with both by `modulora merge`"
        )
    base = model or saved.base_name
    if not base.startswith("package:") and not base.lower().endswith(".gguf"):
        raise AdapterError(
            f"adapter {adapter}: expected a GGUF file as the base that llama.cpp loads it on, got "
            f"{base}; name one with --model FILE.gguf"
        )
    source = open_model(base)
    assert isinstance(source.store, GGUFStore)
    first = next(iter(saved.deltas.values()))
    alpha = first.scale * first.rank
    tensors = {
        f"{name}.{factor}": tensor
        for module, delta in saved.deltas.items()
        for name, A, B in [_in_file(source, module, delta, alpha)]
        for factor, tensor in (("lora_a", A), ("lora_b", B))
    }
    architecture, partial = source.store.architecture, out.with_name(f"{out.name}.partial")
    writer = GGUFWriter(partial, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)
    return LoRAFileResult(str(out), base, architecture, len(saved.deltas))


def _in_file(
    source: ModelSource, module: str, delta: AdapterDelta, alpha: float
) -> tuple[str, Tensor, Tensor]:
    """The name of the base's tensor, A, and B in the file's order of rows."""
    assert isinstance(source.store, GGUFStore)
    parameter = f"{module}.weight"
    stored = source.stored_names(parameter) if parameter in source.parameters else []
    names = [name for one in stored for name in source.store.names_in_file(one)]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise AdapterError(
            f"{module}: expected one tensor of its own in {source.location.name}, got {found}; "
            "llama.cpp can't load this adapter there"
        )
    rows = source.converted(parameter, source.store.row_numbers).flatten().to(torch.int64)
    shape = source.store.shape_in_file(names[0])
    if delta.shape != shape or not torch.equal(rows.sort().values, torch.arange(shape[0])):
        raise AdapterError(
            f"{module}: expected an adapter of {list(shape)} for {names[0]} of "
            f"{source.location.name}, got {list(delta.shape)}"
        )
    B = torch.empty(delta.B.shape, dtype=torch.float32)
    B[rows] = delta.B.float() * (delta.scale * delta.rank / alpha)
    return names[0], delta.A.float().contiguous(), B
