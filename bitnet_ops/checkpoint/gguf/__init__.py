"""Files in the format GGUF."""
