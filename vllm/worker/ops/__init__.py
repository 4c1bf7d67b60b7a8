"""Triton kernels over the KV cache."""
