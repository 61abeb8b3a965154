"""Examples as modules, and a tiny model for them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modulora_core.tests.adapted_models import save_llama_with_tokenizer

EXAMPLES = Path(__file__).parents[1]
FOLDERS = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]


@pytest.fixture(scope="session")
def module():
    """Imports a script by name. Benchmarks import each other from their own folder."""
    before, known = torch.get_num_threads(), set(sys.modules)
    torch.set_num_threads(1)
    sys.path[:0] = FOLDERS
    yield importlib.import_module
    sys.path[:] = [path for path in sys.path if path not in FOLDERS]
    for name in set(sys.modules) - known:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a random Llama of two small layers and a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    save_llama_with_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def run():
    """Runs ``python -m WORDS`` in a folder, with the packages of a site folder too."""

    def run(folder, site, *words):
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def install(run, tmp_path_factory):
    """Installs a package from a wheel of its own into a new folder, and nothing else."""
    pytest.importorskip("hatchling", reason="builds a wheel without network: pip install hatchling")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", "site"]

    def install(package):
        folder = tmp_path_factory.mktemp(package.name)
        done = run(folder, folder, "pip", "install", *flags, str(package))
        assert done.returncode == 0, done.stderr
        return folder / "site"

    return install
