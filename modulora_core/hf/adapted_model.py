"""Override the methods of a transformers model that differ while it has adapters of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from modulora_core.distributed import is_first, whole
from modulora_core.hf.publishing import upload
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_names


class AdaptedModel:
    """The methods of a transformers model that differ from its own if it has adapters of ours."""

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write the adapters and no base, as PEFT does: others than the first in subfolders.

        A model without adapters writes its packed folder.

        transformers' Trainer passes a ``state_dict``, and continues a checkpoint with the file that
        has its name. So the parameters that train are also written to it, by their names here.

        Args:
            push_to_hub: upload the folder too. The options go to
                :func:`modulora_core.hf.publishing.upload`.
        """
        assert isinstance(self, nn.Module)
        names = adapter_names(self)
        if not names:
            without: Any = super()
            without.save_pretrained(save_directory, push_to_hub=push_to_hub, **options)
            return
        for name in names:
            folder = Path(save_directory)
            save_adapter(self, folder if name == names[0] else folder / name, name=name)
        if "state_dict" in options:
            trained = {n: whole(p) for n, p in self.named_parameters() if p.requires_grad}
            if is_first():
                save_file(trained, Path(save_directory) / SAFE_WEIGHTS_NAME, {"format": "pt"})
        if push_to_hub:
            upload(save_directory, **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters as torch does; of a model with adapters frozen ones may be missing."""
        assert isinstance(self, nn.Module)
        result = nn.Module.load_state_dict(self, state_dict, strict, assign)
        if not adapter_names(self):
            return result
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = [name for name in result.missing_keys if name in trained]
        return type(result)(missing, result.unexpected_keys)
