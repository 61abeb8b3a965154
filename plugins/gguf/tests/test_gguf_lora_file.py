"""An adapter becomes a LoRA file of llama.cpp: names and rows of the base, and the same product."""

import gguf
import pytest
import torch
from modulora_gguf.file.lora_file import write_lora_file
from modulora_gguf.tests.adapted import adapted
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf

from modulora_core.cli import main
from modulora_core.errors import AdapterError, ModelError, OutputError
from modulora_core.hf.load_model import load_model
from modulora_core.lora.adapted import adapter_layers


def permuted(weight, heads):
    """``permute`` of llama.cpp's converter of Llama models (conversion of q and k)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "lfm2"])
def test_the_file_has_the_changes_of_the_adapter(architecture, tmp_path):
    path = write_tiny_gguf(architecture, tmp_path / "base.gguf", "Q8_0")
    model = adapted(path, tmp_path / "adapter")
    out = tmp_path / "lora.gguf"
    found = write_lora_file(str(tmp_path / "adapter"), out, model=str(path))
    reader, base = gguf.GGUFReader(out), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 12.0
    assert fields["general.architecture"] == architecture
    shapes = {tensor.name: list(reversed(tensor.shape)) for tensor in base.tensors}
    factors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(factors) == 2 * found.modules == 2 * len(list(adapter_layers(model)))
    for name in {name.rpartition(".")[0] for name in factors}:
        A, B = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        assert [len(B), A.shape[1]] == shapes[name]
    if architecture != "llama":
        return
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for module, layer in adapter_layers(model):
        values = layer.parameters_of("default")
        name = names.get_name(module)
        heads = {"q": 4, "k": 2}.get(name[-1]) if "attn" in name else None
        B = values["lora_B"] if heads is None else permuted(values["lora_B"], heads)
        assert torch.equal(factors[f"{name}.weight.lora_a"], values["lora_A"])
        assert torch.equal(factors[f"{name}.weight.lora_b"], B), name


def test_experts_have_stacks_of_factors(tmp_path):
    """Gates and ups are fused in memory: both have the same A, and each its rows of B."""
    path = write_tiny_gguf("qwen3moe", tmp_path / "base.gguf", "Q8_0")
    layers = dict(adapter_layers(adapted(path, tmp_path / "adapter")))
    write_lora_file(str(tmp_path / "adapter"), tmp_path / "lora.gguf", model=str(path))
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    fused = layers["model.layers.1.mlp.experts.gate_up_proj"].parameters_of("default")
    for name, rows in (("gate", slice(0, 768)), ("up", slice(768, None))):
        prefix = f"blk.1.ffn_{name}_exps.weight"
        assert torch.equal(found[f"{prefix}.lora_a"], fused["lora_A"])  # [experts, r, in]
        assert torch.equal(found[f"{prefix}.lora_b"], fused["lora_B"][:, rows])
    down = layers["model.layers.1.mlp.experts.down_proj"].parameters_of("default")
    assert torch.equal(found["blk.1.ffn_down_exps.weight.lora_b"], down["lora_B"])


def test_requests_are_refused(tmp_path):
    path = write_tiny_gguf("llama", tmp_path / "base.gguf", "Q8_0")
    other = write_tiny_gguf("gpt2", tmp_path / "other.gguf", "Q8_0")
    adapted(path, tmp_path / "adapter")
    adapter, out = str(tmp_path / "adapter"), tmp_path / "lora.gguf"
    with pytest.raises(
        AdapterError, match=r"other\.gguf has no tensor of it; llama\.cpp can't load"
    ):
        write_lora_file(adapter, out, model=str(other))
    moved = path.rename(tmp_path / "moved.gguf")
    with pytest.raises(AdapterError, match=r"base /.*base\.gguf, got no such .*--model FOLDER"):
        write_lora_file(adapter, out)
    moved.rename(path)
    (tmp_path / "lora.Modelfile").write_text("SYSTEM mine")
    with pytest.raises(OutputError, match=r"lora\.Modelfile: expected a new file beside lora\.g"):
        write_lora_file(adapter, out, model=str(path))
    (tmp_path / "lora.Modelfile").unlink()
    with pytest.raises(AdapterError, match=r"expected a GGUF file as the base"):
        write_lora_file(adapter, out, model=str(tmp_path))
    with pytest.raises(OutputError, match="expected a new file"):
        write_lora_file(adapter, path, model=str(path))
    assert not out.exists()
    write_lora_file(adapter, out)  # the adapter remembers its base's path
    with pytest.raises(ModelError, match="expected a model in this GGUF file, got type adapter"):
        load_model(out)


def test_finetune_writes_the_file_at_the_end(tmp_path, capsys):
    path = str(write_tiny_gguf("llama", tmp_path / "base.gguf", "Q8_0"))
    data, out = tmp_path / "notes.txt", tmp_path / "lora.gguf"
    data.write_text("the ship sailed north and the crew sang " * 20)
    words = ["finetune", path, str(tmp_path / "adapter"), "--data", str(data), "--steps", "2"]
    words += ["--batch-size", "1", "--grad-accum", "1", "--seq-len", "16", "--no-baseline"]
    assert main([*words, "--lora-file", str(tmp_path / "lora.bin")]) == 2
    (tmp_path / "lora.Modelfile").touch()
    assert main([*words, "--lora-file", str(out)]) == 2
    (tmp_path / "lora.Modelfile").unlink()
    assert main([*words, "--lora-file", str(out), "--train-scales"]) == 2
    assert "it holds no channel scales" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
    assert main([*words, "--lora-file", str(out)]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"files{out},{out.with_suffix('.Modelfile')}" in shown
    write_lora_file(str(tmp_path / "adapter"), tmp_path / "again.gguf", model=path)
    assert out.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    assert (tmp_path / "lora.Modelfile").read_text() == (
        "# ollama create NAME -f lora.Modelfile\nFROM ./base.gguf\nADAPTER ./lora.gguf\n"
    )


def test_a_newcomer_needs_no_options(tmp_path, capsys):
    """Windows are as long as the model's, which is shorter than the default. The file has no
    suffix."""
    data = tmp_path / "notes.txt"
    path = write_tiny_gguf("llama", tmp_path / "some.gguf", "Q4_0").rename(tmp_path / "sha256-1a")
    data.write_text("the ship sailed north and the crew sang " * 20)
    words = ["finetune", str(path), str(tmp_path / "out"), "--data", str(data), "--steps", "2"]
    assert main([*words, "--seq-len", "512"]) == 2
    assert "seq_len 512: expected at most 64" in capsys.readouterr().err
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"modulora convert {tmp_path / 'out'} ADAPTER.gguf --to gguf --model {path}" in shown
    assert "seq_len: 64\n" in (tmp_path / "out" / "finetune.yaml").read_text()
