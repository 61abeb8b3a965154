"""Run a model: open it, generate, evaluate."""
