"""What transformers calls: its quantizer for our folders, packed modules, and saving a model."""
