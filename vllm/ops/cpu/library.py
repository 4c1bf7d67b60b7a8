"""Loads the compiled CPU kernels of `csrc/cpu`.

The library asks nothing of Python or torch but the OpenMP run-time that torch has loaded, so one build serves every
version of both.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from vllm import envs
from vllm.exceptions import StartupError
from vllm.logger import init_logger

logger = init_logger(__name__)

INSTRUCTIONS = ("avx2", "avx512", "avx512_bf16", "amx")

_LIBRARY = Path(__file__).parents[2] / "cpu_kernels.so"
_INTERFACE = 6
"""`kInterface` of `csrc/cpu/api.h`."""


@lru_cache
def library() -> ctypes.CDLL | None:
    """The library, ready for use with the best instructions of this processor, or those of `VLLM_CPU_INSTRUCTIONS` if
    they are lesser; None, said once why, where there is none."""
    if not _LIBRARY.exists():
        logger.warning(
            "The compiled CPU kernels are not built (%s is missing); torch computes instead, several times slower. "
            "Install g++ (11 or newer) and run: pip install -e .",
            _LIBRARY.name,
        )
        return None
    try:
        lib = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        logger.warning("The compiled CPU kernels cannot be loaded (%s); torch computes instead.", error)
        return None
    if not hasattr(lib, "vsp_interface") or lib.vsp_interface() != _INTERFACE:
        logger.warning(
            "The compiled CPU kernels (%s) are of another version of this package; torch computes instead, several "
            "times slower. Run: pip install -e .",
            _LIBRARY.name,
        )
        return None
    best = lib.vsp_best_instructions()
    if best < 0:
        logger.warning("The compiled CPU kernels need a processor with AVX2, FMA and F16C; torch computes instead.")
        return None
    asked = envs.cpu_instructions()
    if asked is not None and asked not in INSTRUCTIONS:
        raise StartupError(f"VLLM_CPU_INSTRUCTIONS is {asked!r}; it takes {', '.join(INSTRUCTIONS)}.")
    if lib.vsp_initialize(best if asked is None else min(best, INSTRUCTIONS.index(asked))):
        logger.warning("torch's OpenMP run-time is not to be found: the compiled CPU kernels use one thread.")
    return lib


def kernels() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise RuntimeError("the compiled CPU kernels are not available")
    return lib


def address(tensor: torch.Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def threads() -> c_int32:
    return c_int32(torch.get_num_threads())
