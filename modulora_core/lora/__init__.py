"""LoRA on any ``torch.nn.Module`` with packed layers."""

from modulora_core.lora.adapting import add_lora as add_lora
from modulora_core.lora.settings import LoRASettings as LoRASettings
