"""The part that runs inside of vLLM, and imports it."""
