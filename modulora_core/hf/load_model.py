"""Load a model with transformers' ``from_pretrained``.

    load_model    a quantized model, whose weights stay packed
    load_dense    a model of floats

:mod:`modulora_core.checkpoints.opening` opens either, and reads only headers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from modulora_core.arguments import checked
from modulora_core.checkpoints.mapped import MappedFiles, keep_one_block
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QUANT_METHOD
from modulora_core.distributed import pick_device
from modulora_core.errors import CheckpointError, OptionError, first_line
from modulora_core.models import ModelSource
from modulora_core.packed_parameters import PackedParameter
from modulora_core.progress import Progress, quiet, terminal_bar
from modulora_core.spec import TensorLayout

LOAD_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_mapped(checkpoint: PackedCheckpoint, device: str) -> None:
    """Refuse a checkpoint that :func:`load_model` can't map. Raises OptionError."""
    if torch.device(device).type != "cpu":
        raise OptionError(
            f"mapped: expected the device cpu, got {device}, to which weights are copied; "
            "leave mapped out"
        )
    if checkpoint.format != QUANT_METHOD:
        raise OptionError(
            f"mapped: expected a checkpoint of modulora's own format, got {checkpoint.format} in "
            f"{checkpoint.path}; write it as one with `modulora convert {checkpoint.name} OUT --to "
            f"{QUANT_METHOD}`, or leave mapped out"
        )


def resolved_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """The dtype that is meant: ``"auto"`` depends on ``device``. Raises OptionError."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in LOAD_DTYPES:
        raise OptionError(f"dtype: expected one of {', '.join(LOAD_DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return getattr(torch, dtype)  # type: ignore[no-any-return]


@checked
def load_model(
    model: str | Path | PackedCheckpoint,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    mapped: bool = False,
    parity_check: bool = True,
) -> PreTrainedModel:
    """Load a quantized model, with its weights packed, as a transformers model in evaluation mode.

    ::

        model = modulora_core.load_model("smollm2-packed")

    On a CPU the weights stay in their files, mapped into memory, if the folder is in our format and
    they need no cast. The files must not change while the model lives.

    Args:
        model: a folder, a Hub id, a file, or an opened checkpoint.
        dtype: the dtype of the activations and of all dense parameters, such as torch.bfloat16 or
            ``"bfloat16"``. ``"auto"`` is float32 on a CPU and bfloat16 elsewhere. Packed tensors
            keep their own.
        device: ``"cpu"``, ``"cuda"``, ...; None takes a GPU if there is one.
        mapped: hold the packed weights of one decoder block in memory at a time, on a CPU only.
        parity_check: on a GPU, let the quantizer compare its kernels with a reference, once for
            each kind of layer (:meth:`modulora_core.spec.Quantizer.check_kernels`). It takes the
            place of kernels that differ.

    Raises:
        OptionError: no such dtype or device, or ``mapped`` on a GPU or for another tool's format.
        PluginError: the quantizer that packed it isn't installed, or can't be used.
        ModelError: nothing is there, or it isn't quantized.
        CheckpointError: a file is missing or damaged, or files and config.json don't fit together.
    """
    device = str(pick_device(device))
    checkpoint = model if isinstance(model, PackedCheckpoint) else open_packed(model)
    checkpoint.check_whole()
    if mapped:
        check_mapped(checkpoint, device)
    files = checkpoint.map_files()
    loaded_as = resolved_dtype(dtype, device)
    with quiet():
        loaded = _from_pretrained(checkpoint, files, device, loaded_as, mapped)
    if files is not None:
        if mapped:
            keep_one_block(loaded, files)
        _drop_cast(checkpoint, files, loaded_as)
    loaded.eval()
    if parity_check and torch.device(device).type == "cuda":
        packed = [each for each in loaded.modules() if isinstance(each, PackedParameter)]
        with terminal_bar("comparing kernels", "kinds of layers") as progress:
            check_kernels(packed, loaded_as, progress)
    return loaded


def check_kernels(
    weights: Iterable[PackedParameter], dtype: torch.dtype, progress: Progress
) -> None:
    """Let quantizers compare their kernels once for each layout of packed weights.

    A kernel that is wrong on one card, driver or compiler would train a model in silence. A
    difference is a RuntimeWarning with the quantizer's sentence.
    """
    kinds = {str(each.packed.layout.to_json()): each for each in weights}
    for done, each in enumerate(kinds.values()):
        progress("comparing kernels", done, len(kinds))
        for difference in each.quantizer.check_kernels(each.packed, dtype):
            warnings.warn(
                f"kernels differ from the reference, which takes their place, slower: {difference}."
                " Please report the output of: modulora doctor --gpu",
                RuntimeWarning,
                stacklevel=3,
            )


def _from_pretrained(
    checkpoint: PackedCheckpoint,
    files: MappedFiles | None,
    device: str,
    dtype: torch.dtype,
    mapped: bool,
) -> PreTrainedModel:
    """Let transformers load our tensors, which are views of ``files`` or converted.

    By ``quant_method`` transformers finds the classes that ``hf_quantizer.py`` registers. It calls
    ``ModuLoRAConfig.from_dict`` with the dictionary below, then ``ModuLoRAHfQuantizer``.
    """
    config = checkpoint.transformers_config()
    # transformers wants a dictionary; no config.json can hold a record
    config.quantization_config = {
        "quant_method": QUANT_METHOD, "record": checkpoint.record, "mapped": mapped
    }  # fmt: skip
    model: PreTrainedModel = type(checkpoint.outline).from_pretrained(
        None, config=config, dtype=dtype, device_map={"": device}, trust_remote_code=False,
        state_dict=checkpoint.tensors() if files is None else files.views(),
    )  # fmt: skip
    model.name_or_path = model.config.name_or_path = checkpoint.base_name
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return model


def load_dense(source: ModelSource, *, dtype: str | torch.dtype, device: str) -> PreTrainedModel:
    """Load a dense model as a transformers model in evaluation mode.

    Raises OptionError, CheckpointError.
    """
    in_folder, loaded_as = source.location.file is None, resolved_dtype(dtype, device)
    # transformers may not know the format of a model in one file, so it gets tensors
    tensors = None if in_folder else dict(source.tensors())
    try:
        with quiet():
            loaded: PreTrainedModel = type(source.outline).from_pretrained(
                source.location.folder if in_folder else None, config=source.config,
                state_dict=tensors, dtype=loaded_as, device_map={"": device},
                trust_remote_code=False,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"model {source.location.model}: transformers cannot load it: {first_line(error)}"
        ) from error
    loaded.eval()
    return loaded


def _drop_cast(checkpoint: PackedCheckpoint, files: MappedFiles, dtype: torch.dtype) -> None:
    """Drop the pages of dense tensors in another dtype: the model has a copy in its own."""
    wanted = str(dtype).removeprefix("torch.")
    cast = [
        name
        for name, stored in checkpoint.parameters.items()
        if isinstance(stored, TensorLayout) and stored.dtype != wanted
    ]
    for pages in files.ranges(cast):
        pages.drop()
