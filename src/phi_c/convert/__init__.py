"""Converts Hugging Face folders of safetensors to GGUF files with the names and metadata that llama.cpp reads."""
