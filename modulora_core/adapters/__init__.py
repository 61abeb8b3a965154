"""LoRA adapters: put on a model, saved and loaded as PEFT's files, merged."""
