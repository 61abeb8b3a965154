"""The code that transformers calls: our quantizer, packed modules, and saving a model."""
