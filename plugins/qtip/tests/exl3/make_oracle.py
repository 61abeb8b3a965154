"""Write ``oracle.json``: what GPTQModel decodes of the random layers of ``exl3_tensors``.

GPTQModel is no dependency. To make the file again, in an environment of its own::

    pip install gptqmodel
    python make_oracle.py

It runs GPTQModel's torch runtime, which decodes in fp32 on a CPU.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from exl3_tensors import BITS, CODES, random_layer, scales
from gptqmodel.nn_modules.exllamav3_torch import ExllamaV3TorchLinear

SHAPE = (128, 256)
"""out, in"""

SAMPLES = 32
"""Values of each weight, evenly spread."""


def read(bits, code, signs):
    tensors = random_layer(SHAPE, bits, code, seed=bits, signs=signs)
    named = {name: t for name, t in tensors.items() if name not in ("su", "sv")}
    if signs:  # its torch runtime knows the unpacked form alone
        for side in "uv":
            named[f"s{side}h"] = torch.from_numpy(scales(tensors, side)).half()
    layer = ExllamaV3TorchLinear(
        in_features=SHAPE[1], out_features=SHAPE[0], name="layer", tensors=named
    )
    inner = layer.get_inner_weight_tensor().half().contiguous().numpy()
    W = layer.get_weight_tensor(torch.float32).T.contiguous().view(-1)
    return {
        "inner": hashlib.sha256(inner.tobytes()).hexdigest(),
        "weight": [float(f"{w:.6g}") for w in W[:: len(W) // SAMPLES].tolist()],
    }


if __name__ == "__main__":
    found = {
        f"{bits} {code}{' signs' if signs else ''}": read(bits, code, signs)
        for bits in BITS
        for code in CODES
        for signs in (False, True)
        if not signs or bits == 3
    }
    text = {"gptqmodel": version("gptqmodel"), "shape": SHAPE, "layers": found}
    (Path(__file__).parent / "oracle.json").write_text(json.dumps(text, indent=1) + "\n")
