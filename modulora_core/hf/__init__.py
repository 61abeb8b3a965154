"""Hugging Face's world: ``from_pretrained``, ``save_pretrained``, and PEFT's adapter files.

``import modulora_core.hf`` registers our checkpoints with transformers: ``from_pretrained`` then
loads packed folders, and takes a :class:`ModuLoRAConfig`. Nothing else registers anything.
"""

from modulora_core.hf.hf_quantizer import ModuLoRAConfig as ModuLoRAConfig
