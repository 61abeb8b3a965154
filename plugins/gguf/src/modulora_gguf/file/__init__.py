"""Models in GGUF files: opened as llama.cpp wrote them, and written back."""
