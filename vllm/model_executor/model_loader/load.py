"""Makes a network on a device and fills it with weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm.config import ModelConfig
from vllm.exceptions import StartupError
from vllm.model_executor.layers.embedding import VocabParallelEmbedding
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.moe import StackedExperts
from vllm.model_executor.model_loader import iterate_weights
from vllm.model_executor.models.base import CausalLM
from vllm.platforms import current_platform
from vllm.transformers_utils.quantization_config import QuantizationConfig

_DUMMY_STD = 0.02
# Of MXFP4 numbers, which are 0 to 6: 2^-7.
_DUMMY_EXPONENT = 120
_CODES = {
    torch.int32: (-(2**31), 2**31),
    torch.int8: (-128, 128),
    torch.uint8: (0, 128),
    torch.float8_e4m3fn: (0, 128),
}
"""Dtypes of codes, and the range of random ones."""


def load_model(
    config: ModelConfig,
    make: Callable[[], CausalLM],
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantizationConfig | None = None,
) -> CausalLM:
    """Returns the network in `config.dtype` on `device`, ready to run.

    Args:
        make: Makes it on the current device, with the default dtype.
        quantization: Of which it is made.

    Raises:
        StartupError: the checkpoint does not fit its configuration, or the memory.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            sketch = make()
        _check_memory(sketch, config, device)
        with torch.device(device):
            model = make()
    except ValueError as error:
        raise StartupError(f"{config.model} cannot be built: {error}.") from None
    finally:
        torch.set_default_dtype(before)
    model.to(device)
    with torch.no_grad():
        if config.load_format == "dummy":
            _fill_with_noise(model, config.seed or 0, device)
        else:
            weights = iterate_weights(config.model_path, config.load_format, config.hf_config, quantization)
            model.load_weights(weights)
        model.finish()
    return model.eval()


def _check_memory(sketch: CausalLM, config: ModelConfig, device: torch.device) -> None:
    """Refuses weights that do not fit before they are read: a CPU would hand out the memory and be killed for it."""
    needed = sum(p.numel() * p.element_size() for p in sketch.parameters())
    for module in sketch.modules():
        if isinstance(module, LinearBase):
            needed += max(0, module.method.finished_bytes(module) - module.loaded_bytes())
        elif isinstance(module, VocabParallelEmbedding):
            needed += module.bytes_in_blocks()
        elif isinstance(module, StackedExperts):
            needed += module.bytes_of_unpacking(device)
    left = current_platform(device.type).available_memory_bytes()
    if needed > left:
        raise StartupError(
            f"The weights of {config.model} take {needed / 2**30:.1f} GiB in {config.dtype}, but only "
            f"{left / 2**30:.1f} GiB of memory are left; use a smaller model or a smaller --dtype."
        )


def _fill_with_noise(model: CausalLM, seed: int, device: torch.device) -> None:
    """Random weights of a usual scale, made on the device: matrices normal, norms one, biases zero; of quantised ones
    random codes, their scales small."""
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("_blocks"):
            parameter.random_(0, 256, generator=generator)
        elif name.endswith("_scales"):
            parameter.fill_(_DUMMY_EXPONENT)
        elif parameter.dtype in _CODES:
            # In place, so that no more than the weights is in memory; of 8-bit floats those below 2, with either sign.
            codes = parameter.view(torch.uint8) if parameter.dtype == torch.float8_e4m3fn else parameter
            codes.random_(*_CODES[parameter.dtype], generator=generator)
            if parameter.dtype == torch.float8_e4m3fn:
                codes.add_(codes.ge(64), alpha=64)
        elif "scale" in name.rpartition(".")[2]:
            parameter.fill_(_DUMMY_STD)
        elif parameter.dim() == 1 or name.endswith("_bias"):
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(0.0, _DUMMY_STD, generator=generator)
