"""Register our checkpoint format with transformers, when both are imported.

``import modulora_core`` must not import transformers, which takes seconds. So if transformers is
not there yet, a finder of ``sys.meta_path`` waits for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODELS = "transformers.modeling_utils"
"""The module that has ``from_pretrained``. Every model's module imports it."""


def register_with_transformers() -> None:
    """Register now if transformers can load models already, otherwise as soon as it can."""
    if _MODELS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from modulora_core.checkpoints.hf.hf_quantizer import register

    register()


class _Finder(MetaPathFinder):
    """Find one module as Python does, and register after it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
