"""Sequences on one model: who runs when, on which pages of the KV cache."""
