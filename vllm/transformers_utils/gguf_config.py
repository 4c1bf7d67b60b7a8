"""What a GGUF file says of its network, as a Hugging Face configuration.

GGUF spells the same numbers by keys that begin with the architecture (`qwen3.attention.head_count`); what it leaves
out, llama.cpp knows by heart, and so does this file: patterns of windows, and scales that only the largest models have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.exceptions import StartupError
from vllm.transformers_utils.gguf import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"
_SHORT_FACTORS, _LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
_NO_TOKEN = 0xFFFFFFFF


class Keys:
    """The metadata of one file's architecture.

    Attributes:
        architecture: First part of its keys.
        head_dim: Size of its heads.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.get("general.architecture"))
        if self.get("expert_count"):
            raise StartupError(f"{file.path} is a mixture of experts, which is not read from GGUF.")
        self.hidden_size = self.count("embedding_length")
        self.num_heads = self.count("attention.head_count")
        self.num_kv_heads = self.count("attention.head_count_kv", self.num_heads)
        self.num_layers = self.count("block_count")
        self.head_dim = self.count("attention.key_length", self.hidden_size // self.num_heads)
        if self.count("attention.value_length", self.head_dim) != self.head_dim:
            raise StartupError(f"{file.path} has keys and values of different size, which is not supported.")

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise StartupError(f"{self.file.path} lacks the key {self.architecture}.{key}.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive number that all layers share."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise StartupError(
                f"{self.file.path}: {self.architecture}.{key} must be one positive number for all layers, got "
                f"{str(value)[:40]}."
            )
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def refuse(self, what: str) -> StartupError:
        return StartupError(f"{self.file.path} {what}, which is not supported for {self.architecture} in GGUF.")


@dataclass(frozen=True)
class Architecture:
    """How files of one architecture are read.

    Attributes:
        model_type, class_name: Of the same network at Hugging Face.
        own: Values beside those that all architectures have; they win over these.
        pairs: Rows of queries and keys are stored so that neighbours turn together; Hugging Face turns halves.
        parts: Names of tensors that stand for other parts than elsewhere.
    """

    model_type: str
    class_name: str
    own: Callable[[Keys], dict[str, Any]]
    pairs: bool = False
    parts: tuple[tuple[str, str], ...] = ()


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises StartupError for one that is not read."""
    name = file.get("general.architecture")
    if name not in ARCHITECTURES:
        raise StartupError(
            f"{file.path} holds architecture {name!r}; supported in GGUF are {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[name]


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The network's shape, by the names of config.json.

    Raises:
        StartupError: an architecture or a variant of it that is not supported, or a missing key.
    """
    architecture = architecture_of(file)
    keys = Keys(file)
    values = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "vocab_size": _vocab_size(file),
        "hidden_size": keys.hidden_size,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.num_layers,
        "num_attention_heads": keys.num_heads,
        "num_key_value_heads": keys.num_kv_heads,
        "head_dim": keys.head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "tie_word_embeddings": not keys.has("output.weight"),
        "bos_token_id": _token(file, "bos"),
        "eos_token_id": _token(file, "eos"),
        "pad_token_id": None,
    }
    return values | architecture.own(keys)


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    tokens = file.get("tokenizer.ggml.tokens")
    if embedding is None and tokens is None:
        raise StartupError(f"{file.path} has neither an embedding nor a vocabulary.")
    return embedding.shape[0] if embedding is not None else len(tokens)


def _token(file: GGUFFile, name: str) -> int | None:
    found = file.get(f"tokenizer.ggml.{name}_token_id")
    return None if found == _NO_TOKEN else found


def _rms(keys: Keys) -> dict[str, Any]:
    return {"rms_norm_eps": keys.need("attention.layer_norm_rms_epsilon")}


def _llama(keys: Keys) -> dict[str, Any]:
    biases = {"attention_bias": keys.has("blk.0.attn_output.bias"), "mlp_bias": keys.has("blk.0.ffn_down.bias")}
    return _rms(keys) | {"rope_parameters": _rope(keys)} | biases


def _qwen2(keys: Keys) -> dict[str, Any]:
    return _rms(keys) | {"rope_parameters": _rope(keys), "use_sliding_window": False}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return _qwen2(keys) | {"attention_bias": keys.has("blk.0.attn_q.bias")}


def _gemma2(keys: Keys) -> dict[str, Any]:
    return _rms(keys) | {
        "rope_parameters": _rope(keys),
        "query_pre_attn_scalar": _scalar(keys, layers_of_largest=46),
        "attn_logit_softcapping": keys.need("attn_logit_softcapping"),
        "final_logit_softcapping": keys.need("final_logit_softcapping"),
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": _layer_types(keys, every=2),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    local = float(keys.get("rope.freq_base_swa", 10000.0))
    return _rms(keys) | {
        "rope_parameters": {
            "full_attention": _rope(keys),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "query_pre_attn_scalar": _scalar(keys, layers_of_largest=62),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": _layer_types(keys, every=6),
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    theta, rotary_dim = float(keys.get("rope.freq_base", 10000.0)), keys.get("rope.dimension_count", keys.head_dim)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    original = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    if keys.has(_LONG_FACTORS):
        # The file stores the factor of cosines and sines, Hugging Face computes the same from the two lengths.
        short, long = (keys.file.load(keys.file.tensors[name]).tolist() for name in (_SHORT_FACTORS, _LONG_FACTORS))
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    return _rms(keys) | {
        "rope_parameters": rope | {"partial_rotary_factor": rotary_dim / keys.head_dim},
        "original_max_position_embeddings": original,
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


def _granite(keys: Keys) -> dict[str, Any]:
    return _llama(keys) | {
        "attention_multiplier": keys.need("attention.scale"),
        "embedding_multiplier": keys.need("embedding_scale"),
        "residual_multiplier": keys.need("residual_scale"),
        "logits_scaling": keys.need("logit_scale"),
    }


def _smollm3(keys: Keys) -> dict[str, Any]:
    # Each fourth layer knows no positions.
    return _llama(keys) | {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(keys.num_layers)]}


def _olmo2(keys: Keys) -> dict[str, Any]:
    if keys.get("attention.sliding_window"):
        raise keys.refuse("has windows (OLMo 3)")
    return _rms(keys) | {"rope_parameters": _rope(keys)}


def _starcoder2(keys: Keys) -> dict[str, Any]:
    return {
        "norm_epsilon": keys.need("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(keys),
        "use_bias": True,
        "sliding_window": keys.get("attention.sliding_window"),
    }


def _cohere2(keys: Keys) -> dict[str, Any]:
    return {
        "layer_norm_eps": keys.need("attention.layer_norm_epsilon"),
        "rope_parameters": _rope(keys),
        "logit_scale": keys.need("logit_scale"),
        "sliding_window": keys.count("attention.sliding_window"),
        "layer_types": _layer_types(keys, every=4),
    }


def _glm4(keys: Keys) -> dict[str, Any]:
    rotary_dim = keys.count("rope.dimension_count")
    rope = _rope_of_whole_head(keys) | {"partial_rotary_factor": rotary_dim / keys.head_dim}
    return _rms(keys) | {"rope_parameters": rope, "attention_bias": keys.has("blk.0.attn_q.bias")}


def _scalar(keys: Keys, layers_of_largest: int) -> int:
    """1 / scale² of the scores: the size of a head, and in the largest model of a family (27B) the width divided by
    the heads. The file does not say it."""
    return keys.hidden_size // keys.num_heads if keys.num_layers == layers_of_largest else keys.head_dim


def _layer_types(keys: Keys, every: int) -> list[str]:
    """Windows in all layers but each `every`th one, unless the file has a pattern of its own."""
    pattern = keys.get("attention.sliding_window_pattern", every)
    if isinstance(pattern, list):
        windows = [bool(window) for window in pattern]
    else:
        windows = [(i + 1) % pattern != 0 for i in range(keys.num_layers)]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _rope(keys: Keys) -> dict[str, Any]:
    rotary_dim = keys.get("rope.dimension_count", keys.head_dim)
    if rotary_dim != keys.head_dim:
        raise keys.refuse(f"rotates only a part of each head ({rotary_dim} of {keys.head_dim})")
    return _rope_of_whole_head(keys)


def _rope_of_whole_head(keys: Keys) -> dict[str, Any]:
    theta = float(keys.get("rope.freq_base", 10000.0))
    plain = {"rope_type": "default", "rope_theta": theta}
    factors = keys.file.tensors.get(ROPE_FACTORS)
    if factors is not None:
        divisors = keys.file.load(factors)
        return plain if bool((divisors == 1).all()) else _llama3(keys, divisors, theta)
    kind = keys.get("rope.scaling.type", "none")
    linear = keys.get("rope.scale_linear")
    if kind == "none" and linear in (None, 1.0):
        return plain
    if keys.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise keys.refuse(f"scales rotary embeddings by attn_factor {keys.get('rope.scaling.attn_factor')}")
    if kind in ("none", "linear"):
        factor = float(keys.get("rope.scaling.factor", linear or 1.0))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": float(keys.need("rope.scaling.factor")),
            "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
        }
    raise StartupError(
        f"{keys.file.path} scales its rotary embedding as {kind!r}; supported are 'none', 'linear' and 'yarn'."
    )


def _llama3(keys: Keys, divisors: torch.Tensor, theta: float) -> dict[str, Any]:
    """Recognises Llama 3's scaling in the divisors of the rotary frequencies (shape [head_dim / 2]).

    The file stores the divisors themselves. Hugging Face's configuration stores what they are computed from, of which
    only the largest varies between released models; the candidate is computed and must match.
    """
    factor = round(float(divisors.max()), 3)
    half = divisors.numel()
    wavelength = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    smooth = ((8192 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(expected, divisors.double(), rtol=1e-3):
        raise keys.refuse(f"scales its rotary embedding in a way of its own ({ROPE_FACTORS})")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "cohere2": Architecture("cohere2", "Cohere2ForCausalLM", _cohere2),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3),
    "glm4": Architecture("glm4", "Glm4ForCausalLM", _glm4, parts=(("ffn_up", "gate_up"),)),
    "granite": Architecture("granite", "GraniteForCausalLM", _granite, pairs=True),
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, pairs=True),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", _olmo2),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _phi3, parts=(("ffn_up", "gate_up"),)),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3, pairs=True),
    "starcoder2": Architecture("starcoder2", "Starcoder2ForCausalLM", _starcoder2),
}
"""`general.architecture` → how it is read. Mistral's files are of architecture llama."""

NOT_WEIGHTS = frozenset((ROPE_FACTORS, _SHORT_FACTORS, _LONG_FACTORS))
"""Tensors that the configuration is read from."""
