"""Decoders that have no file of their own, computed by transformers' modelling code around our attention.

transformers asks a registered function for attention, by queries, keys and values of each layer. Ours writes keys and
values into the KV cache and reads them as all other networks here do, so that chunks, mixed batches and pinned prompts
work as elsewhere. A batch is one row of tokens for transformers: everything but attention must treat each token alone.

What layers ask for is not guessed from the configuration: a pass over tensors without memory (`meta`) records it. What
is recorded must be causal attention, once a layer; anything else that could reach over to another token is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm.attention.layer import ForwardContext
from vllm.attention.spec import AttentionSpec
from vllm.exceptions import StartupError
from vllm.kv_cache.spec import LayerCache, PagedKV, Row
from vllm.model_executor.models.base import CausalLM
from vllm.ops.cpu.kernels import CompiledSteps, SequenceRows

_ATTENTION = "vllm_paged"
# Arguments of attention that do not change its result here: it is causal, and knows positions from the cache.
_IRRELEVANT = frozenset(
    (
        *("position_ids", "use_cache", "cache_position", "is_causal", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
    )
)
# Rotary frequencies that depend on the longest sequence of a batch: keys in the cache would be turned by others.
_ROPES_BY_LENGTH = ("dynamic", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_BIASED_SCORES = ("bloom", "mpt")
_ALLOWED_LOST = ("rotary_emb.inv_freq",)

AttentionCall = Callable[
    [nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float, dict[str, Any]], torch.Tensor
]
"""(module, q [1, H, T, D], k [1, KVH, T, D], v [1, KVH, T, DV], mask, scale, options) → [1, T, H, DV]."""

_attend: ContextVar[AttentionCall] = ContextVar("attend")


def refusal(config: PretrainedConfig, why: str) -> StartupError:
    name = (config.architectures or ["?"])[0]
    return StartupError(
        f"{name} (model type {config.model_type!r}) cannot be served, neither by a network of this package nor through "
        f"transformers' own: {why}."
    )


class TransformersModel(CausalLM):
    """A network of transformers. Made on the current device, its weights undefined.

    Args:
        config: Of an architecture that transformers has as a decoder for text.
        dtype: Of weights and activations.

    Raises:
        StartupError: it does something that the KV cache here cannot hold; the message names it.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        super().__init__()
        _check_configuration(config)
        self.config = CONFIG_MAPPING[config.model_type].from_dict(config.to_dict())
        self.dtype = dtype
        self.layers, self._output_kind = _trial(self.config, dtype)
        self.attention_specs = list(dict.fromkeys(self.layers))
        self._plans = [self.attention_specs.index(spec) for spec in self.layers]
        self._take(_make(self.config, dtype))

    def _take(self, network: Any) -> None:
        """Keeps the body and, apart from it, what makes logits of its states."""
        self.body = network.base_model
        self.hidden_size = int(network.get_input_embeddings().weight.shape[1])
        setattr(network, network.base_model_prefix, _Given(self._output_kind))
        self.top = network

    def caches(self) -> list[LayerCache]:
        return [
            PagedKV(Row(s.num_kv_heads, s.head_dim, s.dtype), Row(s.num_kv_heads, s.v_dim, s.dtype))
            for s in self.layers
        ]

    def layer_kinds(self) -> list[int]:
        return list(range(len(self.layers)))

    @contextmanager
    def only_layers(self, indexes: Sequence[int]) -> Iterator[None]:
        """Trials run all layers: where transformers' code keeps them is its own affair."""
        yield

    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        token = _attend.set(_CachedAttention(self.layers, self._plans, context))
        try:
            hidden = self.body(input_ids=token_ids[None], position_ids=context.positions[None], use_cache=False)[0][0]
        finally:
            _attend.reset(token)
        return hidden if context.wanted is None else hidden[context.wanted]

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        scores: torch.Tensor = self.top(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return scores if out is None else out.copy_(scores)

    def most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden).float().argmax(dim=-1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """transformers loads them, since it knows what checkpoints call them and how they are fused: in host memory,
        then on the device."""
        device, kind = next(self.parameters()).device, type(self.top)
        del self.body, self.top
        try:
            network, report = kind.from_pretrained(
                None,
                config=self.config,
                state_dict=dict(weights),
                dtype=self.dtype,
                attn_implementation=_ATTENTION,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise StartupError(f"The checkpoint does not fit its configuration, says transformers: {reason}") from error
        lost = [name for name in report["unexpected_keys"] if not name.endswith(_ALLOWED_LOST)]
        for names, what in ((report["missing_keys"], "lacks"), (lost, "has unknown")):
            if names:
                some = ", ".join(sorted(names)[:3])
                raise StartupError(f"The checkpoint {what} {len(names)} tensors, among them {some}.")
        self._take(network.to(device).eval())

    def finish(self) -> None:
        """Weights stay as they are."""

    def compiled_steps(
        self, rows: SequenceRows, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor]
    ) -> CompiledSteps | None:
        return None


class _Given(nn.Module):
    """Stands for a body whose states are known: they come as embeddings.

    Args:
        kind: What the body returns.
    """

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self._kind = kind

    @property
    def decoder(self) -> _Given:
        """Some bodies have an inner one, which is asked instead (OPT)."""
        return self

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **options: Any) -> Any:
        return self._kind(last_hidden_state=inputs_embeds)


class _CachedAttention:
    """Attention of one pass, layer after layer, over the KV cache."""

    def __init__(self, specs: Sequence[AttentionSpec], plans: Sequence[int], context: ForwardContext) -> None:
        self._layers = iter(enumerate(zip(specs, plans, strict=True)))
        self._context = context

    def __call__(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        options: dict[str, Any],
    ) -> torch.Tensor:
        context = self._context
        i, (spec, plan) = next(self._layers)
        qkv = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (q, k, v)], dim=1)
        k_cache, v_cache, backend = context.k_caches[i], context.v_caches[i], context.backend
        queries = backend.rope_and_write(
            qkv, context.positions, None, None, context.slot_mapping, k_cache, v_cache, spec.num_heads
        )
        sinks = options["s_aux"] if spec.sinks else None
        return backend.attend(queries, k_cache, v_cache, spec, context.prepared[plan], sinks)[None]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _attend.get()(module, query, key, value, attention_mask, scale, options), None


def _make(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The network on the current device."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    AttentionInterface.register(_ATTENTION, _attention)
    with no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION).eval()


def _check_configuration(config: PretrainedConfig) -> None:
    """Refuses by name what a configuration says that cannot work."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = (config.architectures or ["?"])[0]
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise refusal(config, "it has an encoder, or attends to one (cross attention)")
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) != name:
        raise refusal(config, "transformers has no decoder for text of that name")
    if getattr(config, "alibi", False) or config.model_type in _BIASED_SCORES:
        raise refusal(config, "it has positions as biases of the scores (ALiBi)")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in _LAYER_TYPES:
            raise refusal(config, f"it has layers of type {kind!r} (served are {', '.join(_LAYER_TYPES)})")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in _ROPES_BY_LENGTH:
            raise refusal(config, f"its RoPE scaling {rope['rope_type']!r} depends on the length of a batch")


def _trial(config: PretrainedConfig, dtype: torch.dtype) -> tuple[list[AttentionSpec], type]:
    """What each layer asks of attention, and what the body returns, by a pass without memory."""
    recorder = _Recorder(config, dtype)
    with torch.device("meta"):
        sketch_config = copy.deepcopy(config)
        # The other ways of computing experts look at what was drawn, which is not there.
        sketch_config._experts_implementation = "batched_mm"
        network = _make(sketch_config, dtype)
        if network._is_stateful or any(isinstance(module, nn.Conv1d) for module in network.modules()):
            raise refusal(config, "it has layers that keep a state (state-space, recurrent or convolutional)")
        tokens = torch.zeros((1, 3), dtype=torch.int64)
        token = _attend.set(recorder)
        try:
            output = network.base_model(input_ids=tokens, position_ids=torch.arange(3)[None], use_cache=False)
        except StartupError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise refusal(config, f"a trial of its code failed ({type(error).__name__}: {reason})") from error
        finally:
            _attend.reset(token)
    recorder.check()
    return recorder.specs, type(output)


class _Recorder:
    """Notes what the layers of a network ask for."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.specs: list[AttentionSpec] = []
        self._modules: set[int] = set()

    def __call__(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        options: dict[str, Any],
    ) -> torch.Tensor:
        where = f"attention of layer {len(self.specs)}"
        if mask is not None:
            raise refusal(self.config, f"{where} has a mask of its own")
        if not (options.get("is_causal", True) and getattr(module, "is_causal", True)):
            raise refusal(self.config, f"{where} also looks ahead (it is not causal)")
        asked = {name: value for name, value in options.items() if value is not None and name not in _IRRELEVANT}
        window, softcap, sinks = (asked.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
        if asked:
            raise refusal(self.config, f"{where} takes the argument {min(asked)!r}, which is not understood")
        if q.shape[2] != k.shape[2] or id(module) in self._modules:
            raise refusal(self.config, f"{where} is no plain self-attention")
        self._modules.add(id(module))
        spec = AttentionSpec(
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            v_dim=v.shape[3],
            scale=scale,
            dtype=self.dtype,
            window=None if window is None else int(window),
            softcap=None if softcap is None else float(softcap),
            sinks=sinks is not None,
        )
        self.specs.append(spec)
        return q.new_empty((1, q.shape[2], spec.num_heads, spec.v_dim))

    def check(self) -> None:
        """Refuses networks with something else than one attention a layer, or with windows that were not asked for."""
        config, specs = self.config, self.specs
        if len(specs) != config.num_hidden_layers:
            raise refusal(
                config,
                f"of its {config.num_hidden_layers} layers, transformers' code asks for attention {len(specs)} times "
                "by its interface for others' (state-space layers, relative biases or old code)",
            )
        size = getattr(config, "sliding_window", None)
        kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
        if not size:
            return
        if not kinds and all(spec.window is None for spec in specs):
            raise refusal(config, f"its code does not hand on sliding_window {size}")
        for i, (kind, spec) in enumerate(zip(kinds, specs, strict=False)):
            if kind == "sliding_attention" and spec.window != size:
                raise refusal(config, f"its code does not hand on the window of layer {i}")
