"""What Triton 3.6's interpreter gets wrong, put right for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Bounds of loops read from memory (`int()` of a one-element array, refused since NumPy 2.4), products of bfloat16
    (multiplied as the integers that store them, also by `dot`), rounding to bfloat16 (cut off instead of to nearest
    even) and to e4m3 (no carry into the exponent).

    A call of one kernel function by another searches the whole language for what to replace, which takes longer than
    most functions. What it replaces stays so: the first call of each module does.
    """
    patch_tensor = interpreter._patch_lang_tensor
    builder = interpreter.InterpreterBuilder
    dot, cast, multiply = builder.create_dot, builder.cast_impl, builder.create_fmul
    fp_to_fp = builder.create_fp_to_fp

    def patch_tensor_repaired(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_repaired(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_repaired(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).reshape(src.data.shape)
        rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def multiply_repaired(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return multiply(self, a, b)
        return cast_repaired(self, multiply(self, widened(a), widened(b)), tl.bfloat16)

    def fp_to_fp_repaired(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.float8e4nv:
            return fp_to_fp(self, src, dst_type, rounding_mode)
        codes = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(codes.view(torch.uint8).numpy(), tl.float8e4nv)

    patched: set[str] = set()

    def call_repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch_tensor_repaired
    builder.create_dot = dot_repaired
    builder.cast_impl = cast_repaired
    builder.create_fmul = multiply_repaired
    builder.create_fp_to_fp = fp_to_fp_repaired
    interpreter.InterpretedFunction.__call__ = call_repaired
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
