"""``modulora finetune`` in this process, on a tiny packed model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from modulora_core.cli import main
from modulora_core.cli.app import load_command
from modulora_core.data.sources import pydoc_text
from modulora_core.training.config import FinetuneConfig

SHORT = ["--batch-size", "2", "--grad-accum", "1", "--seq-len", "32"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(pydoc_text()[:1000])
    return file


def test_the_flags_are_the_fields_of_the_config() -> None:
    """If this fails: a flag is a field of FinetuneConfig; add it there, and it is in the file format too."""
    params = {param.name: param for param in load_command("finetune").params}
    own = {"config", "resume", "json", "debug"}
    assert set(params) - own == set(FinetuneConfig.model_fields)
    for name, field in FinetuneConfig.model_fields.items():
        param = params[name]
        assert param.default is None, "the default is the config's"
        described = (field.description or "").rstrip(".")
        assert described[1:] in param.help
        if name not in ("model", "out"):
            assert param.opts == [f"--{name.replace('_', '-')}"]
        if isinstance(field.default, int | float | str):
            assert f"(default: {field.default})" in param.help


def test_help_comes_without_torch() -> None:
    code = """if True:
        import sys
        from modulora_core.cli import main
        code = main(["finetune", "--help"])
        sys.exit(str([name for name in ("torch", "numpy", "transformers") if name in sys.modules]))
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.stderr.strip() == "[]"
    assert "modulora finetune smollm2-packed my-adapter" in result.stdout


def test_it_trains_and_reports(
    tunable: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tunable), str(tmp_path / "out"), "--data", str(text), "--steps", "2", *SHORT]
    assert main(["finetune", *words, "--eval-data", str(text), "--eval-every", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'out'}: 2 steps, loss ")
    assert "on the evaluation data" in printed.out
    assert "tokens/s, peak memory" in printed.out
    assert "step 1: loss " in printed.err
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_config_file_equals_the_flags_and_they_override_it(
    tunable: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(text), "--data", str(text), "--steps", "2", "--lr", "1e-2", "--rank", "4", "--alpha", "8",
             "--targets", "q_proj,up_proj", "--no-gradient-checkpointing", "--scheduler", "linear", *SHORT]  # fmt: skip

    def run(out: str, *words: str) -> dict[str, object]:
        assert main(["finetune", str(tunable), str(tmp_path / out), *words, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert set(printed) == {"out", "steps", "losses", "eval_loss", "seconds", "tokens_per_second",
                                "peak_memory_bytes"}  # fmt: skip
        return printed  # type: ignore[no-any-return]

    first = run("first", *flags)
    file = tmp_path / "first" / "finetune.yaml"
    config = FinetuneConfig.build({}, file=file)
    assert config == FinetuneConfig.build(
        {"model": str(tunable), "out": str(tmp_path / "first"), "data": [str(text), str(text)], "steps": 2,
         "lr": 1e-2, "rank": 4, "alpha": 8, "targets": ("q_proj", "up_proj"), "gradient_checkpointing": False,
         "scheduler": "linear", "batch_size": 2, "grad_accum": 1, "seq_len": 32}
    )  # fmt: skip
    assert run("again", "--config", str(file))["losses"] == first["losses"]
    assert run("other", "--config", str(file), "--seed", "3", "--epochs", "1")["steps"] != 2


def test_an_interrupted_run_is_resumed(
    tunable: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "finetune",
        str(tunable),
        str(tmp_path / "out"),
        "--data",
        str(text),
        "--steps",
        "2",
        *SHORT,
        "--json",
    ]
    assert main(words) == 0
    losses = json.loads(capsys.readouterr().out)["losses"]
    (tmp_path / "out" / "adapter_config.json").unlink()
    assert main(words) == 2
    assert "go on with it with --resume" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main([*words, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["losses"] == losses


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (
            "modulora_core.training.finetune.finetune",
            ["finetune", "m", "o", "--data", "pydoc", "--steps", "1"],
        ),
        ("modulora_core.quantization.quantize.quantize", ["quantize", "m", "o", "-q", "toy"]),
    ],
    ids=["finetune", "quantize"],
)
def test_ctrl_c_in_work_that_can_be_resumed_says_so(
    work: str,
    words: list[str],
    toy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    for flags in ([], ["--json"]):
        assert main([*words, *flags]) == 130
        assert capsys.readouterr() == ("", "interrupted; the same command with --resume goes on\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "o", "--data", "pydoc"], "expected steps or epochs, got neither"),
        (["m", "o", "--data", "pydoc", "--steps", "1", "--epochs", "1"], "expected steps or epochs, got both"),
        (["m", "o", "--steps", "1"], "option 'data': expected a value, got none"),
        (["--data", "pydoc", "--steps", "1"], "option 'model': expected a value, got none"),
        (["m", "o", "--data", "pydoc", "--steps", "0"], "greater than or equal to 1, got 0"),
        (["m", "o", "--data", "pydoc", "--steps", "1", "--dtype", "int"], "option 'dtype': expected 'auto', 'float32'"),
        (["m", "o", "--config", "no-such.yaml"], "config no-such.yaml: No such file"),
        (["m", "o", "--data", "pydoc", "--learning-rate", "1"], "no such option: --learning-rate"),
    ],
    ids=["neither", "both", "no-data", "no-model", "range", "choice", "no-file", "unknown"],
)  # fmt: skip
def test_a_wrong_request_is_one_sentence_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
