"""Model files: the table of architectures, the configuration in a GGUF file, its weights, the packed-weight cache."""
