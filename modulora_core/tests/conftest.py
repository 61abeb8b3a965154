"""Fixtures of several test files: a small plugin package, and tiny packed models.

``toy_site`` holds the plugin as an outsider's package would be installed: modules and a dist-info
folder, which the real importlib.metadata finds on the path.
"""

import importlib
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from modulora_core import registry
from modulora_core.tests.fake_hub import COMMIT
from modulora_core.tests.fake_site import FakeSite

TOY_SITE = Path(__file__).parent / "toy_site"
"""A folder that, on the path, installs the distribution modulora-toy."""

TOY_INIT, TOY_QUANTIZER, TOY_FORMAT = (
    (TOY_SITE / "modulora_toy" / name).read_text("utf-8")
    for name in ("__init__.py", "quantizer.py", "crude.py")
)


def install_package(root, distribution, entry_point, package, files):
    """Lay out ``package`` and its dist-info below ``root`` as pip would."""
    folder = root / package
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    info = root / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[modulora]\n{entry_point} = {package}\n")


@contextmanager
def installed_quantizers(root, name, init, quantizer):
    """The module of quantizers of ``modulora_NAME``, a plugin in ``root`` while this lasts."""
    package, files = f"modulora_{name}", {"__init__.py": init, "quantizer.py": quantizer}
    install_package(root, f"modulora-{name}", name, package, files)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module(f"{package}.quantizer")
    finally:
        sys.path.remove(str(root))


@pytest.fixture(scope="session")
def toy_root():
    return TOY_SITE


@pytest.fixture(scope="session")
def toy(toy_root):
    """The module with ``Toy`` and ``Verbatim``, installed as a plugin for the session."""
    sys.path.insert(0, str(toy_root))
    importlib.invalidate_caches()
    yield importlib.import_module("modulora_toy.quantizer")
    sys.path.remove(str(toy_root))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The Hub's cache in a folder of this test, without a network: the files of org/tiny."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def pack(toy, tmp_path_factory):
    """``pack(architecture, quantizer)`` gives the folders of a tiny model, dense and packed."""
    from modulora_core.quantization.quantize import quantize
    from modulora_core.tests.tiny_models import save_tiny_model

    made = {}

    def folders(architecture, quantizer="verbatim", exclude=()):
        key = (architecture, quantizer, exclude)
        if key not in made:
            root = tmp_path_factory.mktemp(architecture)
            dense = save_tiny_model(architecture, root / "dense")
            quantize(str(dense), root / "packed", quantizer, exclude=exclude)
            made[key] = dense, root / "packed"
        return made[key]

    return folders


@pytest.fixture(scope="session")
def tunable(toy, tmp_path_factory):
    """The folder of a tiny packed Llama with a tokenizer and a window of 128 tokens."""
    from modulora_core.quantization.quantize import quantize
    from modulora_core.tests.adapted_models import save_llama_with_tokenizer

    root = tmp_path_factory.mktemp("tunable")
    save_llama_with_tokenizer(root / "dense")
    quantize(str(root / "dense"), root / "packed", "toy")
    return root / "packed"


@pytest.fixture(scope="module")
def one_thread():
    """Tiny products on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site-packages folder on the path of this process; its modules are forgotten afterwards."""
    monkeypatch.delenv(registry.BLOCK_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield FakeSite(tmp_path)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
