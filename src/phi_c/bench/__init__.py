"""Benchmarks of models and kernels, and models with random weights to run them on."""
