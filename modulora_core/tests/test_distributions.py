"""The distributions of this repository: their metadata agree, and importing one opens no socket."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from modulora_core.tests.conftest import TOY_SITE

ROOT = Path(__file__).parents[2]
OURS = [
    ROOT,
    ROOT / "conformance",
    *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml")),
]
PROJECTS = [*OURS, *sorted(path.parent for path in ROOT.glob("examples/*/pyproject.toml"))]
ALL = ROOT / ".ci" / "distribution"

REFUSE = """
import importlib, pkgutil, socket, sys

def refuse(*arguments, **options):
    raise AssertionError(f"a connection: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""

IMPORT_ALL = (
    REFUSE
    + """
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        words = module.name.split(".")
        skipped = {"tests", "gpu", "engine", "__main__"} & set(words)
        if not skipped and not words[-1].startswith("test_"):
            importlib.import_module(module.name)
"""
)

USE = f"""{REFUSE}
import modulora_core as api

for name in api.__all__:
    if name != "finetune":  # it imports transformers' Trainer, and so bitsandbytes
        getattr(api, name)
import torch
ids = torch.arange(3, 27).view(2, 12)
model = api.load_model(sys.argv[1], device="cpu")
model.generate(ids[:1], max_new_tokens=2)
api.add_lora(model)
model(input_ids=ids, labels=ids).loss.backward()
assert "bitsandbytes" not in sys.modules, "it asks the Hub for a kernel if `kernels` is there"
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "conformance").is_dir(), reason="an installed package has one distribution"
)


def project(path):
    return tomllib.loads((path / "pyproject.toml").read_text())


@pytest.mark.parametrize("path", [*PROJECTS, ALL], ids=lambda path: path.name)
def test_metadata_agree(path):
    ours, root = project(path), project(ROOT)["project"]
    for field in ("version", "license", "license-files", "requires-python"):
        assert ours["project"][field] == root[field], field
    assert set(root["classifiers"]) <= set(ours["project"]["classifiers"])
    assert (path / "README.md").is_file()
    assert (path / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for package in ours["tool"]["hatch"]["build"]["targets"]["wheel"].get("packages", []):
        assert (path / package / "py.typed").is_file()


def test_the_whole_distribution_has_every_other_one():
    ours = {project(path)["project"]["name"] for path in OURS}
    assert {Requirement(text).name for text in project(ALL)["project"]["dependencies"]} == ours


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.name)
def test_each_library_that_a_module_imports_is_declared(path):
    """By its distribution, or by the core's, which all others need."""
    described = project(path)
    extras = described["project"].get("optional-dependencies", {}).values()
    needed = [*described["project"]["dependencies"], *project(ROOT)["project"]["dependencies"]]
    declared = {canonical(Requirement(text).name) for text in sum(extras, needed)}
    declared.add(canonical(described["project"]["name"]))
    found = set()
    for package in described["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        for file in (path / package).rglob("*.py"):
            if not {"tests", "gpu", "kernels"} & set(file.relative_to(path / package).parts):
                for node in ast.parse(file.read_text("utf-8")).body:
                    found |= top_level(node)
    owners = packages_distributions()
    named = {name: {canonical(each) for each in owners.get(name, ())} for name in found}
    assert {name for name, of in named.items() if of and of.isdisjoint(declared)} == set()


def canonical(name):
    return name.lower().replace("_", "-")


def top_level(node):
    """The packages of a statement, if it is an absolute import."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {str(node.module).partition(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def test_loading_and_training_open_no_connection(tunable):
    process = subprocess.run(
        [sys.executable, "-c", USE, str(tunable)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(TOY_SITE)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_importing_opens_no_connection():
    names = [
        Path(*project(path)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]).name
        for path in OURS
    ]
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
