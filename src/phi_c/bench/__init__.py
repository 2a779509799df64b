"""Measures how fast models and kernels run; writes models of random weights, to measure without a download."""
