"""Text processing: tokenizers, chat templates, streaming detokenisation."""
