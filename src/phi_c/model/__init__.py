"""Model files: the GGUF header, the configuration it describes and the weights it holds."""
