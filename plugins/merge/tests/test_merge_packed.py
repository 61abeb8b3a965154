"""A merged model keeps the adapter's effect, and all bytes of its base but codes."""

import json

import pytest
import torch
from modulora_convert.convert import convert
from modulora_evaluate.evaluate import evaluate
from modulora_gguf.file.model_header import read_header
from modulora_gguf.tests.adapted import adapted
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from modulora_merge import merging
from modulora_merge.copying import _OfForeign
from modulora_merge.merging import merge_packed

from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import check_digests
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.cli import main as run
from modulora_core.errors import AdapterError, DataError, ModelError, OptionError, OutputError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.other_tools import logits
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def merged(model, out, adapter, text, **options):
    few = {"samples": 16, "seq_len": 32, "held_back": 8, "progress": False}
    return merge_packed(model, out, adapter=adapter, calibration=str(text), **few | options)


def stored(folder):
    return open_packed(str(folder)).tensors()


def adapter_of(model, out, std, **settings):
    """An adapter whose B has this size."""
    adapted(model, out, std, LoRASettings(rank=2, **settings))
    return out


CASES = {
    "nf4": ("nf4", {}, {"codes"}),
    "int8": ("int8", {}, {"codes"}),
    "optq": ("optq", {"bits": 3}, {"codes"}),
    "fp4": ("fp4", {}, {"codes"}),
    "gguf": ("gguf", {"type": "Q4_0"}, {"blocks"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_effect_is_kept_and_only_codes_differ(case, trained, text, tmp_path):
    quantizer, options, of_codes = CASES[case]
    packed, adapter = trained(quantizer, options)
    made = merged(packed, tmp_path / "out", adapter, text)
    assert made.kept is not None
    assert made.kept > 0.6
    before, after = stored(packed), stored(tmp_path / "out")
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in after.items()}
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in differing} == of_codes
    assert 0 < made.changed < made.weights
    assert made.adapted == 14
    assert check_digests(tmp_path / "out") > 3


def test_the_figures_are_those_of_evaluate(trained, text, tmp_path, monkeypatch):
    """The same segments, one by one, through the command's own function."""
    packed, adapter = trained("nf4")
    seen = []
    measure = merging.divergence

    def spied(before, other, ids, **more):
        seen.append(ids)
        return measure(before, other, ids, **more)

    monkeypatch.setattr(merging, "divergence", spied)
    made = merged(packed, tmp_path / "out", adapter, text)
    [ids] = seen
    facts = made.to_json()
    models = {"base": load_model(packed), "merged": load_model(tmp_path / "out")}
    for name, model in models.items():
        with torch.no_grad():
            loss = torch.stack([model(input_ids=i[None], labels=i[None]).loss for i in ids]).mean()
        assert facts[f"perplexity_{'of_' * (name == 'base')}{name}"] == pytest.approx(
            float(loss.exp()), rel=1e-4
        )
    beside = facts["perplexity_beside"]
    assert max(beside, facts["perplexity_merged"]) < facts["perplexity_of_base"]


def test_an_adapter_of_zeros_gives_the_bytes_of_the_base(trained, text, tmp_path):
    packed, _ = trained("nf4")
    adapter = adapter_of(packed, tmp_path / "adapter", std=0.0)
    made = merged(packed, tmp_path / "out", adapter, text, held_back=0)
    assert (made.changed, made.kept) == (0, None)
    for file in packed.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("architecture", "type"),
    [("llama", "Q4_0"), ("llama", "Q4_1"), ("qwen2", "Q5_0"), ("qwen3moe", "Q8_0")],
)
def test_a_file_keeps_its_header_types_and_scales(architecture, type, text, tmp_path, monkeypatch):
    """Rows that the file orders otherwise, and stacks of experts, are put back."""
    path, out = write_tiny_gguf(architecture, tmp_path / "base.gguf", type), tmp_path / "out.gguf"
    adapter = adapter_of(path, tmp_path / "adapter", std=0.5)
    ids = torch.randint(3, 27, (24, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(merging, "token_segments", lambda *_, **__: ids)
    monkeypatch.setattr(PackedCheckpoint, "tokenizer", lambda _: None)
    made = merged(path, out, adapter, text, held_back=0)
    assert made.changed > 0
    before, after = path.read_bytes(), out.read_bytes()
    assert len(after) == len(before)
    base, written = read_header(path), read_header(out)
    assert [(t.name, t.type, t.shape, t.offset) for t in base.tensors] == [
        (t.name, t.type, t.shape, t.offset) for t in written.tensors
    ]
    assert before[: base.tensors[0].offset] == after[: base.tensors[0].offset]
    model = load_model(path)
    plain = logits(model)
    load_adapter(model, adapter)
    beside = logits(model)
    found = logits(load_model(out))
    # a random model has no inputs whose errors could make up for each other: some effect is kept
    assert (found - beside).norm() < 0.85 * (plain - beside).norm()


def test_a_fine_grid_gets_the_change_and_not_a_larger_one(trained, text, tmp_path):
    packed, adapter = trained("int8")
    merged(packed, tmp_path / "out", adapter, text, held_back=0)
    model = load_model(packed)
    plain = logits(model)
    load_adapter(model, adapter)
    beside = logits(model)
    found = logits(load_model(tmp_path / "out"))
    assert (found - beside).norm() < 0.1 * (plain - beside).norm()


def test_a_folder_of_another_tool_gets_other_codes_in_its_own_form(trained, text, tmp_path):
    packed, adapter = trained("optq", {"act_order": False})
    convert(packed, tmp_path / "gptq", "gptq", progress=False)
    made = merged(tmp_path / "gptq", tmp_path / "out", adapter, text)
    assert made.kept is not None
    assert made.kept > 0.6
    assert open_packed(str(tmp_path / "out")).format == "gptq"
    sizes = {
        f.name: f.stat().st_size for f in (tmp_path / "gptq").iterdir() if f.name != "SHA256SUMS"
    }
    assert all((tmp_path / "out" / name).stat().st_size == size for name, size in sizes.items())


def test_a_second_adapter_trains_on_the_merged_model(trained, text, tmp_path):
    packed, adapter = trained("nf4")
    merged(packed, tmp_path / "out", adapter, text, held_back=0)
    second = adapter_of(tmp_path / "out", tmp_path / "second", std=0.2)
    made = merged(tmp_path / "out", tmp_path / "twice", second, text, held_back=0)
    assert made.changed > 0
    kwargs = {"data": str(text), "seq_len": 32, "progress": False}
    assert evaluate(tmp_path / "twice", **kwargs).perplexity > 1


def test_weights_without_a_grid_are_refused_before_work(toy, trained, text, tmp_path):
    packed, adapter = trained("toy")
    with pytest.raises(OptionError, match=r"q_proj.*on a grid, got toy; merge into a dense model"):
        merged(packed, tmp_path / "out", adapter, text)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_head_is_refused(text, tmp_path):
    save_tiny_model("llama", tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "nf4", head="nf4", progress=False)
    adapter = adapter_of(
        tmp_path / "packed", tmp_path / "adapter", 0.1, targets=("q_proj", "lm_head")
    )
    with pytest.raises(AdapterError, match="inside of decoder blocks alone, got one of the head"):
        merged(tmp_path / "packed", tmp_path / "out", adapter, text)


def test_a_short_text_and_a_used_place_are_refused(trained, text, tmp_path):
    packed, adapter = trained("nf4")
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:400])
    with pytest.raises(DataError, match=r"text for 8 held-back segments .* or --held-back"):
        merged(packed, tmp_path / "out", adapter, short)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").touch()
    with pytest.raises(OutputError, match="expected it new or empty"):
        merged(packed, tmp_path / "used", adapter, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "used"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_in_a_form_that_we_do_not_write_is_refused(trained, text, tmp_path, monkeypatch):
    """As of a tool whose words hold the same codes in another order."""
    packed, adapter = trained("optq", {"act_order": False})
    convert(packed, tmp_path / "gptq", "gptq", progress=False)
    ours = _OfForeign._tensors

    def other(copy, name, matrices):
        return {key: tensor.flip(0) for key, tensor in ours(copy, name, matrices).items()}

    monkeypatch.setattr(_OfForeign, "_tensors", other)
    with pytest.raises(
        ModelError, match=r"qweight: expected the tensor of gptq as modulora writes"
    ):
        merged(tmp_path / "gptq", tmp_path / "out", adapter, text)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_comparison(trained, text, tmp_path, capsys):
    packed, adapter = trained("nf4")
    words = ["merge-packed", str(packed), str(tmp_path / "out"), "--json"]
    assert run([*words, "--adapter", str(adapter)]) == 2
    said = capsys.readouterr().out
    assert "--calibration" in said
    assert "nearest point of its grid, which loses the adapter" in said
    assert run([*words, "--calibration", str(text)]) == 2
    assert "--adapter: expected the adapter to merge" in capsys.readouterr().out
    words += ["--adapter", str(adapter), "--calibration", str(text), "--seq-len", "32"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity_merged"] < found["perplexity_of_base"]
    assert 0 < found["effect_kept"] < 1.2


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_interrupted_merge_continues_to_the_same_bytes(
    kind, trained, text, tmp_path, monkeypatch
):
    """What was merged is not merged again; another request is refused."""
    packed, adapter = trained("nf4")
    whole, out = tmp_path / "whole", tmp_path / "out"
    if kind == "file":
        packed, whole, out = (tmp_path / f"{name}.gguf" for name in ("packed", "whole", "out"))
        write_tiny_gguf("llama", packed, "Q4_0")
        adapter = adapter_of(packed, tmp_path / "adapter", std=0.5)
    quiet, rounded, calls = {"held_back": 0}, merging.rounded_to_grid, []

    def counted(*given, **options):
        calls.append(1)
        if stops and len(calls) == 9:  # q, k, v and o are done
            raise KeyboardInterrupt
        return rounded(*given, **options)

    stops = []
    monkeypatch.setattr(merging, "rounded_to_grid", counted)
    expected = merged(packed, whole, adapter, text, **quiet)
    of_whole = len(calls)
    calls.clear()
    stops.append(True)
    with pytest.raises(KeyboardInterrupt):
        merged(packed, out, adapter, text, **quiet)
    assert [*tmp_path.glob("out*")] == [tmp_path / f"{out.name}.merging"]
    with pytest.raises(OutputError, match="unfinished merge; go on with it with --resume"):
        merged(packed, out, adapter, text, **quiet)
    with pytest.raises(OptionError, match="got another options; ask for the same"):
        merged(packed, out, adapter, text, gain=1, resume=True, **quiet)
    stops.clear()
    calls.clear()
    made = merged(packed, out, adapter, text, resume=True, **quiet)
    assert len(calls) <= of_whole - 4
    assert (made.weights, made.changed) == (expected.weights, expected.changed)
    files = [whole] if kind == "file" else [*whole.glob("*.safetensors")]
    for file in files:
        assert file.read_bytes() == (out / file.name if out.is_dir() else out).read_bytes()
    assert not [*tmp_path.glob("*.merging")]
