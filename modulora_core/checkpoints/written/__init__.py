"""Writing: output folders that appear whole, shards, the model card."""
