"""The GGUF file format: reader, writer and constants. No other package knows the byte layout."""
