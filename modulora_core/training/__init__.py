"""Finetuning: the config of a run, the Trainer, its checkpoints, and the loss."""
