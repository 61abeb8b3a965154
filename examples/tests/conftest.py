"""Examples as modules, and a tiny model for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from modulora_core.tests.adapted_models import save_llama_with_tokenizer

EXAMPLES = Path(__file__).parents[1]
FOLDERS = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]


@pytest.fixture(scope="session")
def module() -> Iterator[Callable[[str], ModuleType]]:
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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama of two small layers and a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    save_llama_with_tokenizer(folder)
    return str(folder)
