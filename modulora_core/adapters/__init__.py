"""LoRA adapters: on a model, in PEFT's files, and merged into the weights."""
