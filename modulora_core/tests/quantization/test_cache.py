"""``finetune -q``: a dense model is quantized into the cache, once."""

from pathlib import Path

import pytest

from modulora_core.errors import DataError, ModelError, OptionError
from modulora_core.quantization import cache
from modulora_core.quantization.cache import cache_folder
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dense(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("MODULORA_CACHE", str(tmp_path / "cache"))
    save_llama_with_tokenizer(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("The with statement wraps a block. " * 20)
    return tmp_path / "dense"


def run(dense, out, **options):
    folder = dense.parent
    fields = {"model": str(dense), "out": str(folder / out), "data": str(folder / "text.txt"),
              "quantizer": "toy", "steps": 1, "batch_size": 1, "grad_accum": 1, "seq_len": 32,
              "baseline": False}  # fmt: skip
    return finetune(FinetuneConfig.build({**fields, **options}))


def folders(dense):
    return sorted(path.name for path in (dense.parent / "cache").iterdir())


def test_the_packed_model_is_made_once_and_is_that_of_quantize(dense, tmp_path, monkeypatch):
    first = run(dense, "first")
    (name,) = folders(dense)
    assert first.model == str(tmp_path / "cache" / name)
    assert name.startswith("dense-toy-")
    quantize(str(dense), tmp_path / "packed", "toy")
    for file in (tmp_path / "packed").iterdir():
        assert (tmp_path / "cache" / name / file.name).read_bytes() == file.read_bytes()
    monkeypatch.setattr(cache, "quantize", None)  # a second quantization would fail
    file = tmp_path / "first" / "finetune.yaml"
    again = finetune(FinetuneConfig.build({"out": str(tmp_path / "again")}, file=file))
    assert (again.model, again.losses) == (first.model, first.losses)


def test_a_wrong_request_is_refused_before_anything_is_quantized(dense, tmp_path):
    for options, error, message in (
        ({"data": str(tmp_path / "no.jsonl")}, DataError, "expected a file"),
        ({"targets": "q_porj"}, Exception, "did you mean 'q_proj'"),
        ({"quantizer": "toy:nothing=1"}, OptionError, "unknown option 'nothing'"),
        ({"quantizer": "toy:"}, OptionError, "expected NAME or NAME:KEY=VALUE"),
        ({"seq_len": 4096}, OptionError, "expected at most 128"),
        ({"quantizer": None}, ModelError, "quantize it first"),
    ):
        with pytest.raises(error, match=message):
            run(dense, "out", **options)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_not_quantized_again(dense, tmp_path):
    quantize(str(dense), tmp_path / "packed", "toy")
    with pytest.raises(ModelError, match="quantized"):
        run(tmp_path / "packed", "out")


def test_without_the_variable_it_is_beside_the_cache_of_the_hub(monkeypatch):
    monkeypatch.delenv("MODULORA_CACHE", raising=False)
    monkeypatch.setattr(cache, "HF_HOME", "/somewhere/huggingface")
    assert cache_folder() == Path("/somewhere/huggingface/modulora")
