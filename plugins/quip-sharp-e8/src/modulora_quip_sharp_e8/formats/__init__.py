"""Foreign checkpoints that this plugin reads."""
