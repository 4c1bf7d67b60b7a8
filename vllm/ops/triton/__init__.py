"""Triton kernels for GPUs; the plain torch reference stands beside each."""
