"""From the format of a layer's weights to the method by which it holds and multiplies them."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.config import ModelConfig
from vllm.exceptions import StartupError
from vllm.model_executor.layers.quantization.at_load import Fp8AtLoad
from vllm.model_executor.layers.quantization.base import LinearMethod, Scheme
from vllm.model_executor.layers.quantization.dequantised import Dequantised
from vllm.model_executor.layers.quantization.fp4 import Fp4
from vllm.model_executor.layers.quantization.fp8 import Fp8
from vllm.model_executor.layers.quantization.gguf import GGUF
from vllm.model_executor.layers.quantization.int4 import Int4
from vllm.model_executor.layers.quantization.int8 import Int8
from vllm.model_executor.layers.quantization.on_gpu import EightBits, FourBits
from vllm.model_executor.layers.quantization.stored import WHOLE, Stored
from vllm.transformers_utils.quantization_config import (
    Fp8Format,
    GGUFFormat,
    Int4Format,
    Int8Format,
    QuantizationConfig,
    WeightFormat,
    quantization_of,
)


def quantization_of_model(model: ModelConfig) -> QuantizationConfig | None:
    """Which matrices of a checkpoint are quantised, or become so as they are loaded.

    Raises:
        StartupError: it cannot be served.
    """
    values = getattr(model.hf_config, "quantization_config", None)
    found = quantization_of(values, model.quantization, model.model)
    if found is None or found.method == "int8_cpu":
        return None
    if model.impl != "vllm":
        raise StartupError(
            f"Weights quantised by {found.method!r} are read for networks of this package only, not for transformers' "
            "code (--model-impl)."
        )
    return found


def scheme_of(format: WeightFormat) -> Scheme:
    """What makes a matrix of a format's tensors."""
    if isinstance(format, Fp8Format):
        return Fp8(format)
    if isinstance(format, Int4Format):
        return Int4(format)
    if isinstance(format, Int8Format):
        return Int8(format)
    if isinstance(format, GGUFFormat):
        raise TypeError("the blocks of a GGUF file are kept, not made a matrix of")
    return Fp4(format)


def stored_of(format: WeightFormat | None) -> Mapping[str, Stored]:
    """The tensors of a matrix, by the end of their names.

    Args:
        format: None: it is whole. GGUF files have one tensor, too.
    """
    if format is None or isinstance(format, GGUFFormat) or (isinstance(format, Fp8Format) and format.at_load):
        return WHOLE
    return scheme_of(format).stored


def linear_method(format: WeightFormat | None, plain: LinearMethod, kernels: bool) -> LinearMethod:
    """How a layer with weights in `format` is held.

    Args:
        format: None: they are whole.
        plain: How this network holds whole weights.
        kernels: There are kernels for quantised weights; otherwise they are dequantised as they are loaded.
    """
    if format is None:
        return plain
    if isinstance(format, GGUFFormat):
        return GGUF(format)
    if isinstance(format, Fp8Format) and format.at_load:
        return Fp8AtLoad(plain)
    scheme = scheme_of(format)
    if not kernels:
        return Dequantised(scheme, plain)
    return EightBits(scheme, plain) if isinstance(scheme, Fp8 | Int8) else FourBits(scheme, plain)
