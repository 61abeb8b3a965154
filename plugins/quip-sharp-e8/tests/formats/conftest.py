"""Folders as relaxml published them, written bit by bit from the description of the layout.

Nothing of the plugin is used: codebooks, transform and words are here again, in slow Python.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 600,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": (),
    "mlp.upgate_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down_proj": (),
}

CODEBOOKS = {2: ("E8P12", 7, 1, 4), 3: ("E8P12RVQ3B", 18, 0, 8 / 3), 4: ("E8P12RVQ4B", 17, 1, 2)}
"""Name, id, version, packsz."""


@pytest.fixture(scope="session")
def relaxml():
    """This module, for the tests beside it."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """``published(bits)``: a folder, not to be changed, and its dense model; each made once."""
    made = {}

    def make(bits):
        if bits not in made:
            folder = tmp_path_factory.mktemp(f"E8P-{bits}Bit") / "m"
            made[bits] = folder, save_relaxml(folder, bits)
        return made[bits]

    return make


@pytest.fixture
def copied(published, tmp_path):
    """``copied(bits)``: a folder to change."""

    def copy(bits=2):
        return Path(shutil.copytree(published(bits)[0], tmp_path / "m"))

    return copy


# --- the points of codes ---------------------------------------------------------------------


def absolute_vectors():
    """The 256 of E8P12, in their order."""
    short = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10]
    halves = (
        "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 "
        "167 157 147 156 146 045 067 057 047 056 046 014 237"
    )
    return short + [
        tuple(0.5 if str(i) in positions else 1.5 for i in range(8))
        for positions in halves.split(" ")
    ]


ABSOLUTE = absolute_vectors()


def e8p(code):
    a, s = code >> 8, code & 255
    v = list(ABSOLUTE[a])
    if sum(v) % 2 == 1:
        v[7] = -v[7]
    p = s.bit_count() % 2
    s ^= p
    shift = -0.25 if p else 0.25
    return [
        x * (-1) ** (s >> bit & 1) + shift
        for x, bit in zip(v, (0, 4, 1, 5, 2, 6, 3, 7), strict=True)
    ]


def e81():
    """The 256 points of the residual at 3 bits, in their order."""
    whole = [v for v in itertools.product((-1, 0, 1), repeat=8)
             if sum(v) % 2 == 0 and sum(x * x for x in v) <= 2]  # fmt: skip
    halves = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    twos = [tuple(sign * 2 * (i == j) for j in range(8)) for sign in (1, -1) for i in range(8)][:15]
    return [*whole, *halves, *twos]


def decode(codes, residual, bits):
    """C, fp64 ``[out, in]``."""
    C = torch.tensor([[x for code in row for x in e8p(code)] for row in codes], dtype=torch.float64)
    if bits == 3:
        points = e81()
        return (
            C + torch.tensor([[x for code in row for x in points[code]] for row in residual]) / 2.04
        )
    if bits == 4:
        return C + torch.tensor([[x for code in row for x in e8p(code)] for row in residual]) / 3.45
    return C


def sylvester(n):
    """H_n for a power of two: entry (i, j) is (−1)^(number of ones in i & j) / √n."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=torch.float64) / n**0.5


# --- the stored form -------------------------------------------------------------------------


def words_of_e8p(codes):
    """int64 ``[out, in / 32]``, each bit put where the description says."""
    m, n = len(codes), 8 * len(codes[0])
    words = [0] * (m * n // 32)
    for t, u, a, b in itertools.product(range(m // 16), range(n // 64), range(8), range(4)):
        for c, r in itertools.product(range(2), range(2)):
            i = 2 * c + r
            code = codes[16 * t + 2 * a + r][(64 * u + 16 * b + 8 * c) // 8]
            word = (code >> 8) << 8 * i
            for j in range(8):
                word |= (code >> j & 1) << 32 + 4 * j + i
            words[((t * (n // 64) + u) * 8 + a) * 4 + b] |= word
    return signed(words).view(m, n // 32)


def words_of_bytes(codes):
    """int64 ``[out, in / 64]``: byte k is code 8 w + k."""
    words = [
        sum(row[8 * w + k] << 8 * k for k in range(8))
        for row in codes
        for w in range(len(row) // 8)
    ]
    return signed(words).view(len(codes), -1)


def signed(words):
    return torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64).copy())


def layer(out, columns, rows, bits, seed, tuned, meaning):
    """The tensors of a layer of random codes, and Ŵ, fp64 ``[out, in]``.

    Args:
        rows: of each part of a fused layer; empty for another.
        tuned: S_U and S_V aren't signs any more.
        meaning: without it Ŵ is zeros, for dimensions that this file has no transform for.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 65536, (out, columns // 8)).tolist()
    residual = rng.integers(0, 256 if bits == 3 else 65536, (out, columns // 8)).tolist()
    S_U, S_V = (
        torch.from_numpy(rng.choice([-1.0, 1.0], n) * (rng.uniform(0.8, 1.25, n) if tuned else 1))
        for n in (columns, out)
    )
    S_U, S_V = S_U.half(), S_V.half()
    scale = torch.tensor(0.05, dtype=torch.float32) + 0.001 * seed
    qidxs = [words_of_e8p(codes)]
    if bits > 2:
        qidxs.append(words_of_bytes(residual) if bits == 3 else words_of_e8p(residual))
    tensors = {"Qidxs": torch.cat(qidxs, dim=1), "SU": S_U, "SV": S_V, "Wscale": scale,
               "codebook_id": torch.tensor(CODEBOOKS[bits][1])}  # fmt: skip
    factors = torch.ones(out)
    if rows:
        tensors["fuse_scales"] = torch.from_numpy(rng.uniform(0.5, 2, len(rows))).float()
        factors = torch.cat(
            [factor.expand(n) for n, factor in zip(rows, tensors["fuse_scales"], strict=True)]
        )
    if not meaning:
        return tensors, torch.zeros(out, columns, dtype=torch.float64)
    output_scale = (S_V.float() * factors).half().double()
    C = decode(codes, residual, bits)
    W = (
        scale.double()
        * output_scale[:, None]
        * (sylvester(out) @ C @ sylvester(columns).T)
        * S_U.double()
    )
    return tensors, W


def save_relaxml(folder, bits=2, *, tuned=True, meaning=True, **sizes):
    """Save a tiny Llama as relaxml published theirs, in one file. Returns the dense model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    layers = itertools.product(range(len(model.model.layers)), PARTS.items())
    for seed, (block, (path, names)) in enumerate(layers, 1):
        prefix = f"model.layers.{block}."
        parts = [model.get_submodule(prefix + name) for name in names or (path,)]
        rows = [part.out_features for part in parts]
        tensors, W = layer(
            sum(rows), parts[0].in_features, rows if names else [], bits, seed, tuned, meaning
        )
        stored |= {f"{prefix}{path}.{name}": tensor for name, tensor in tensors.items()}
        for name, part, weight in zip(names or (path,), parts, W.split(rows), strict=True):
            del stored[f"{prefix}{name}.weight"]
            part.weight.data = weight.float()
    save_file(stored, file, {"format": "pt"})
    codebook, _, version, packsz = CODEBOOKS[bits]
    params = {
        "lora_rank": 0,
        "rescale_WH": False,
        "codebook": codebook,
        "codebook_version": version,
        "codesz": 8,
        "idx_dtype": "torch.int64",
        "packsz": packsz,
        "resid_scale_override": -1,
    }
    edit_config(folder, quip_params=params)
    return model


def edit_config(folder, **changes):
    """None removes a key."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None})
    )


def edit_params(folder, **changes):
    """Change ``quip_params``. None removes a key."""
    values = json.loads((folder / "config.json").read_text())["quip_params"] | changes
    edit_config(
        folder, quip_params={key: value for key, value in values.items() if value is not None}
    )


def stored(folder):
    return {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }


def change(folder, **tensors):
    """Put other tensors into the file. None removes one."""
    changed = stored(folder) | tensors
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
