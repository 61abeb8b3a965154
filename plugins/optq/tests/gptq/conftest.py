"""GPTQ folders written bit by bit from the format's description, without our code."""

import json
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def gptq():
    """This module, for the tests beside it."""
    return sys.modules[__name__]


def words(streams, bits):
    """Each list of codes as one little-endian bit stream in 32-bit words: ``[words, streams]``."""
    columns = []
    for codes in streams:
        stream = sum(code << bits * i for i, code in enumerate(codes))
        count = len(codes) * bits // 32
        columns.append([stream >> 32 * i & 0xFFFFFFFF for i in range(count)])
    return torch.from_numpy(np.array(columns, dtype=np.uint32).view(np.int32).T.copy())


@dataclass(frozen=True)
class Layer:
    """A quantized layer in plain numbers: q ``[out, in]``, z, s ``[out, groups]``, g ``[in]``."""

    q: Tensor
    z: Tensor
    s: Tensor
    g: Tensor
    bits: int

    @classmethod
    def random(cls, out, columns, bits, group, *, symmetric, permuted, seed):
        generator = torch.Generator().manual_seed(seed)
        size = columns if group == -1 else group
        groups = -(-columns // size)
        q = torch.randint(0, 2**bits, (out, columns), generator=generator)
        z = torch.randint(1, 2**bits, (out, groups), generator=generator)
        z = torch.full_like(z, 2 ** (bits - 1)) if symmetric else z
        s = ((torch.rand(out, groups, generator=generator) + 0.5) / 2 ** (bits + 1)).half()
        g = torch.arange(columns) // size
        return cls(
            q, z, s, g[torch.randperm(columns, generator=generator)] if permuted else g, bits
        )

    @property
    def weight(self):
        """Ŵ, fp32 ``[out, in]``."""
        return (self.q - self.z[:, self.g]).float() * self.s.float()[:, self.g]

    def tensors(self, version):
        z = self.z - 1 if version == 1 else self.z
        return {
            "qweight": words(self.q.tolist(), self.bits).contiguous(),
            "qzeros": words(z.T.tolist(), self.bits).T.contiguous(),
            "scales": self.s.T.contiguous(),
            "g_idx": self.g.to(torch.int32),
        }


def save_gptq(
    folder,
    *,
    bits=4,
    group=16,
    version=2,
    symmetric=False,
    permuted=False,
    head=False,
    g_idx=True,
    files=1,
    config_file="config.json",
    others=None,
    kept=(),
    vocab_size=SIZES["vocab_size"],
    **config,
):
    """Save a tiny Llama whose linear layers are random codes. Returns the same model, dense.

    Args:
        others: other bits and group size, by the last part of a layer's name.
        kept: last parts of names that stay dense.
        config: more of the quantization config.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": vocab_size})).eval()
    model.save_pretrained(folder)
    stored = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    for seed, (name, module) in enumerate(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or leaf in kept or (name == "lm_head" and not head):
            continue
        its_bits, its_group = (others or {}).get(leaf, (bits, group))
        sizes = module.out_features, module.in_features, its_bits, its_group
        layer = Layer.random(*sizes, symmetric=symmetric, permuted=permuted, seed=seed)
        del stored[f"{name}.weight"]
        parts = layer.tensors(version)
        stored |= {
            f"{name}.{part}": tensor for part, tensor in parts.items() if g_idx or part != "g_idx"
        }
        module.weight.data = layer.weight
    _save(folder, stored, files)
    quantization = {
        "bits": bits, "group_size": group, "sym": symmetric, "desc_act": permuted, "lm_head": head,
        "quant_method": "gptq", **({"checkpoint_format": "gptq_v2"} if version == 2 else {}),
        **config,
    }  # fmt: skip
    if config_file == "config.json":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**values, "quantization_config": quantization})
        )
    else:
        del quantization["quant_method"]
        (folder / config_file).write_text(json.dumps(quantization))
    return model


def _save(folder, tensors, files):
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    if files == 1:
        names = ["model.safetensors"]
    else:
        index = {"weight_map": {tensor: names[i % files] for i, tensor in enumerate(tensors)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, file in enumerate(names):
        save_file(dict(list(tensors.items())[i::files]), folder / file, {"format": "pt"})


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def change(folder, **tensors):
    """Put other tensors into a folder of one file."""
    file = folder / "model.safetensors"
    changed = {name: tensor.clone() for name, tensor in load_file(file).items()} | tensors
    save_file(changed, file, {"format": "pt"})
