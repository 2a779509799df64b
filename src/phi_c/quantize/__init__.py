"""Quantisation: type mixes, importance matrices and the quantiser."""
