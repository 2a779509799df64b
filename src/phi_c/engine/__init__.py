"""The inference engine: scheduling of sequences, KV cache pages, and the step that runs a batch."""
