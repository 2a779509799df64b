"""The GGUF file format: the only code that reads or writes it."""
