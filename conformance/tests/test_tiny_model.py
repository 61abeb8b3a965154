"""The folders of the kit's model."""

from __future__ import annotations

import gc
import warnings

from modulora_conformance.tiny_model import TinyModel


def test_a_model_that_nobody_needs_any_more_leaves_neither_files_nor_a_warning() -> None:
    """If this fails: a plugin of more configurations than are kept fails where warnings are errors, in whatever test is running then."""
    model = TinyModel()
    root = model.root
    (root / "file").write_text("text", encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del model
        gc.collect()
    assert not root.exists()
    assert not caught
