"""Fused Triton kernels of the layers, each beside its torch reference."""
