"""Operations on tensors, a file each: the plain torch form, and which kernel computes it on which device.

Kernels lie in `triton/` (GPUs), `cpu/` (bindings of the compiled CPU kernels) and `attention/`. Nothing here imports
a layer, a cache or an engine.
"""
