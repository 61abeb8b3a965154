"""Save folders in the format ``crude``, as another tool would: nothing of the core is used."""

import json

import torch
from safetensors.torch import load_file, save_file

from modulora_core.tests.tiny_models import tiny_model


def save_crude(
    folder,
    architecture="llama",
    *,
    chosen=lambda name: name.endswith("proj"),
    files=1,
    config_file="config.json",
    **more,
):
    """Save a tiny model with its chosen layers quantized.

    Args:
        chosen: by the name of a layer in the file.
        files: the number of shards.
        config_file: the file of the quantization config; None for a key of its own in config.json.
        more: tensors to add to the file.

    Returns:
        the dense model with the rounded weights.
    """
    model = tiny_model(architecture)
    model.save_pretrained(folder)
    tensors = {}
    rounded = {}
    for name, mapped in load_file(folder / "model.safetensors").items():
        tensor = mapped.clone()  # older releases map the file, which is written again
        module = name.removesuffix(".weight")
        if module == name or tensor.dim() != 2 or not chosen(module):
            tensors[name] = rounded[name] = tensor
            continue
        conv1d = architecture == "gpt2"
        weight = tensor.t() if conv1d else tensor  # [out, in]
        factor = weight.abs().amax(1) / 127
        codes = (weight / factor[:, None]).round().to(torch.int8)
        tensors |= {f"{module}.turned": codes.t().contiguous(), f"{module}.factor": factor}
        Ŵ = codes.float() * factor[:, None]
        rounded[name] = Ŵ.t().contiguous() if conv1d else Ŵ
    _save(folder, tensors | more, files)
    _save_config(folder, config_file)
    model.load_state_dict(rounded, strict=False)
    return model


def _save(folder, tensors, files):
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for file in names:
        shard = {name: tensors[name] for name, place in weight_map.items() if place == file}
        save_file(shard, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _save_config(folder, config_file):
    quantization = {"quant_method": "crude", "levels": 127}
    if config_file is None:
        edit_config(folder, crude_levels=127)
    elif config_file == "config.json":
        edit_config(folder, quantization_config=quantization)
    else:
        (folder / config_file).write_text(json.dumps(quantization))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
