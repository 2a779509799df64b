"""Hugging Face folders of safetensors become GGUF files with the names and metadata that llama.cpp reads."""
