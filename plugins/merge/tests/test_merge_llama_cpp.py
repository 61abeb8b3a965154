"""Files that llama.cpp quantized are merged into, and llama.cpp decodes and runs the result.

Where llama-cpp-python is installed.
"""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from modulora_gguf.tests.adapted import adapted
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from modulora_merge import merging

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.hf.load_model import load_model
from modulora_core.lora.settings import LoRASettings

llama_cpp = pytest.importorskip("llama_cpp")

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""llama.cpp's numbers of file types (``llama_ftype``). Those with K mix types of blocks."""


def by_llama_cpp(source, out, type):
    """llama.cpp's own conversion to a type; 0 is F32."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = type, True
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(settings)
    )
    assert not failed
    return out


def values(path):
    """The tensors of a file in F32, by the gguf package."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors
    }


def of_llama_cpp(path, ids):
    found = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0
    )  # fmt: skip
    found.eval(ids)
    return torch.from_numpy(np.array(found.scores[: len(ids)]))


def of_ours(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("type", TYPES)
def test_llama_cpp_decodes_and_runs_the_merged_file_as_we_do(type, tmp_path, monkeypatch):
    dense = write_tiny_gguf("llama", tmp_path / "dense.gguf", wide=True)
    base = by_llama_cpp(dense, tmp_path / "base.gguf", TYPES[type])
    adapted(base, tmp_path / "adapter", settings=LoRASettings(rank=2))
    ids = torch.randint(3, 60, (24, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(merging, "token_segments", lambda *_, **__: ids)
    monkeypatch.setattr(PackedCheckpoint, "tokenizer", lambda _: None)
    out = tmp_path / "merged.gguf"
    made = merging.merge_packed(
        base, out, adapter=tmp_path / "adapter", calibration="", held_back=0, progress=False
    )
    assert made.changed > 0
    assert out.stat().st_size == base.stat().st_size
    tested = list(range(5, 45))
    found = of_ours(load_model(out), tested)
    before = of_ours(load_model(base), tested)
    decoded = by_llama_cpp(out, tmp_path / "decoded.gguf", 0)
    ours, theirs = values(out), values(decoded)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)
    # in F32 llama.cpp rounds no activations
    assert (of_llama_cpp(decoded, tested) - found).norm() < 1e-4 * found.norm()
    rounded = of_llama_cpp(base, tested) - before  # what it rounds before merging
    assert (of_llama_cpp(out, tested) - found).norm() < 2 * rounded.norm()
