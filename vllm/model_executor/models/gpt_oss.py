"""gpt-oss (OpenAI, 2025): attention sinks, a window of 128 tokens in every other layer, YaRN, and experts with biases
and a clamped SwiGLU, in MXFP4 as they are published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import LAYER_NAMES, CheckpointNames, DecoderSpec, MoE
from vllm.ops.moe import ClampedSwiGLU, Routing

NAMES = CheckpointNames(
    parts={
        **{part: name for part, name in LAYER_NAMES.items() if not part.startswith("expert.")},
        "router": "mlp.router",
    }
)


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, mlp_bias=False, hidden_act="silu")
    spec = llama.decoder(config, max_positions)
    ffn = MoE(
        config.num_local_experts,
        config.intermediate_size,
        ClampedSwiGLU(_value(config, "swiglu_alpha", 1.702), _value(config, "swiglu_limit", 7.0)),
        Routing(config.num_experts_per_tok, scoring="chosen"),
        biases=True,
        router_bias=True,
        columns=True,
        mxfp4=_is_packed(config),
    )
    layer = replace(spec.layers[0], ffn=ffn)
    layers = (
        replace(layer, mixer=replace(layer.mixer, window=window, sinks=True))
        for window in config_values.windows(config, max_positions)
    )
    return replace(spec, layers=tuple(layers), names=NAMES)


def _value(config: PretrainedConfig, key: str, default: float) -> float:
    value = getattr(config, key, None)
    return default if value is None else float(value)


def _is_packed(config: PretrainedConfig) -> bool:
    quantization: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method")
    if method not in (None, "mxfp4"):
        raise config_values.refused(config, f"quant_method {method!r}", "'mxfp4', or none")
    return method is not None
