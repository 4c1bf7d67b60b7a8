"""Arguments of other servers that this one has no use for: which are accepted without effect, which are refused.

The command line (`entrypoints.args`) and the keywords of `EngineArgs` treat them alike.
"""

from __future__ import annotations

import json
from typing import Any

from vllm.exceptions import StartupError
from vllm.logger import init_logger

logger = init_logger(__name__)

# Flags that change only speed or logs in other servers, or belong to a feature that this one does not have and that a
# flag or field of its own would ask for. By what follows them: nothing, a value, or several.
NO_EFFECT_SWITCHES = (
    "aggregate-engine-logging",
    "allow-deprecated-quantization",
    "async-scheduling",
    "cohere-is-reasoning-model",
    "cudagraph-metrics",
    "data-parallel-external-lb",
    "data-parallel-hybrid-lb",
    "dcp-q-replicate",
    "disable-async-output-proc",
    "disable-cascade-attn",
    "disable-chunked-mm-input",
    "disable-custom-all-reduce",
    "disable-frontend-multiprocessing",
    "disable-hybrid-kv-cache-manager",
    "disable-logprobs-during-spec-decoding",
    "disable-mm-preprocessor-cache",
    "disable-nccl-for-dp-synchronization",
    "enable-batch-sharded-sampling",
    "enable-chunked-prefill",
    "enable-cumem-allocator",
    "enable-dbo",
    "enable-elastic-ep",
    "enable-ep-weight-filter",
    "enable-eplb",
    "enable-expert-parallel",
    "enable-fault-tolerance",
    "enable-flash-late-interaction",
    "enable-flashinfer-autotune",
    "enable-hc-sp",
    "enable-layerwise-nvtx-tracing",
    "enable-logging-iteration-details",
    "enable-mamba-cache-stochastic-rounding",
    "enable-mamba-shared-prefix-checkpoint",
    "enable-mfu-metrics",
    "enable-mixed-moe-lora-format",
    "enable-moe-shared-loras",
    "enable-multimodal-encoder-data-parallel",
    "enable-nccl-comm-suspend",
    "enable-offline-docs",
    "enable-prompt-tokens-details",
    "enable-reasoning",
    "enable-server-load-tracking",
    "enable-shm-tensor-arena",
    "enable-sleep-mode",
    "enable-tower-connector-lora",
    "engine-use-ray",
    "fail-on-environ-validation",
    "fully-sharded-loras",
    "guided-decoding-disable-fallback",
    "interleave-mm-strings",
    "jit-monitor-verbose",
    "kv-cache-metrics",
    "kv-sharing-fast-prefill",
    "log-error-stack",
    "long-prefill-token-threshold-adaptive",
    "mm-device-do-normalize",
    "numa-bind",
    "ray-workers-use-nsight",
    "scheduler-reserve-full-isl",
    "skip-mm-profiling",
    "sleep-mode-offload-cudagraph",
    "specialize-active-lora",
    "swa-bounded-replay",
    "trust-request-mm-kwargs",
    "use-fp64-gumbel",
    "use-replayssm",
    "use-tqdm-on-load",
    "use-v2-block-manager",
    "worker-use-ray",
)
# What this server does anyway.
ANYWAY_SWITCHES = ("language-model-only",)
NO_EFFECT_VALUES = (
    "all2all-backend",
    "allowed-local-media-path",
    "allowed-media-domains",
    "api-server-count",
    "block-allocator",
    "cohere-format",
    "compilation-config",
    "cp-kv-cache-interleave-size",
    "cpu-distributed-timeout-seconds",
    "data-parallel-address",
    "data-parallel-backend",
    "data-parallel-rpc-port",
    "data-parallel-supervisor-port",
    "dbo-decode-token-threshold",
    "dbo-prefill-token-threshold",
    "dcp-comm-backend",
    "dcp-kv-cache-interleave-size",
    "disable-access-log-for-endpoints",
    "distributed-timeout-seconds",
    "dp-supervisor-probe-failure-threshold",
    "dp-supervisor-probe-interval-s",
    "dp-supervisor-probe-timeout-s",
    "dp-sync-interval",
    "ec-manager-config",
    "elastic-ep-max-dp-size",
    "eplb-config",
    "expert-placement-strategy",
    "fault-tolerance-config",
    "gdn-prefill-backend",
    "guided-decoding-backend",
    "h11-max-header-count",
    "h11-max-incomplete-event-size",
    "ir-op-priority",
    "jit-monitor-mode",
    "kda-decode-backend",
    "kda-prefill-backend",
    "kernel-config",
    "kv-cache-metrics-sample",
    "kv-offloading-backend",
    "kv-offloading-size",
    "limit-mm-per-prompt",
    "linear-backend",
    "log-config-file",
    "log-level",
    "logging-config",
    "lora-dtype",
    "lora-extra-vocab-size",
    "mamba-backend",
    "mamba-block-size",
    "mamba-cache-dtype",
    "mamba-cache-mode",
    "mamba-cache-philox-rounds",
    "mamba-ssm-cache-dtype",
    "mamba-ssu-algorithm",
    "master-addr",
    "master-port",
    "max-context-len-to-capture",
    "max-cpu-loras",
    "max-cudagraph-capture-size",
    "max-long-partial-prefills",
    "max-lora-cls-labels",
    "max-lora-rank",
    "max-loras",
    "max-num-active-seqs",
    "max-num-partial-prefills",
    "max-num-scheduled-tokens",
    "max-parallel-loading-workers",
    "max-prompt-adapters",
    "max-seq-len-to-capture",
    "mm-encoder-attn-backend",
    "mm-encoder-attn-dtype",
    "mm-encoder-fp8-scale-path",
    "mm-encoder-fp8-scale-save-margin",
    "mm-encoder-fp8-scale-save-path",
    "mm-encoder-tp-mode",
    "mm-hasher-algorithm",
    "mm-ipc-gpu-memory-gb",
    "mm-processor-cache-gb",
    "mm-processor-cache-type",
    "mm-processor-device",
    "mm-shm-cache-max-object-size-mb",
    "mm-tensor-ipc",
    "moe-backend",
    "num-lookahead-slots",
    "num-scheduler-steps",
    "offload-backend",
    "offload-num-in-group",
    "offload-prefetch-step",
    "optimization-level",
    "otlp-traces-endpoint",
    "performance-mode",
    "preemption-mode",
    "prefill-schedule-interval",
    "prefix-cache-retention-interval",
    "prefix-caching-hash-algo",
    "prefix-match-unit",
    "pt-load-map-location",
    "renderer-num-workers",
    "replayssm-buffer-len",
    "safetensors-load-strategy",
    "safetensors-prefetch-block-size",
    "safetensors-prefetch-num-threads",
    "scheduler-delay-factor",
    "show-hidden-metrics-for-version",
    "sparse-indexer-topk-backend",
    "stream-interval",
    "swap-space",
    "tokenizer-pool-extra-config",
    "tokenizer-pool-size",
    "tokenizer-pool-type",
    "ubatch-size",
    "video-pruning-method",
    "video-pruning-rate",
    "watermark",
)
NO_EFFECT_LISTS = (
    "collect-detailed-traces",
    "cpu-offload-params",
    "cuda-graph-sizes",
    "cudagraph-capture-sizes",
    "ignore-patterns",
    "lora-target-modules",
    "numa-bind-cpus",
    "numa-bind-nodes",
    "offload-params",
    "sleep-preserve-parameter-names",
)

# Flags whose feature does not exist here: the values that mean what this server does anyway.
UNSUPPORTED_SWITCHES = (
    "calculate-kv-scales",
    "data-parallel-multi-port-external-lb",
    "disable-sliding-window",
    "enable-lora",
    "enable-mm-embeds",
    "enable-per-request-metrics",
    "enable-prompt-adapter",
    "enable-prompt-embeds",
    "enable-return-routed-experts",
    "enable-scale-out",
    "enable-ssl-refresh",
    "enable-tokenizer-info-endpoint",
    "enable-trace-replay",
    "grpc",
    "headless",
    "mm-encoder-only",
    "return-sampling-mask",
    "skip-tokenizer-init",
    "tokens-only",
)
UNSUPPORTED_VALUES: dict[str, tuple[str, ...]] = {
    "additional-config": ("{}",),
    "anthropic-disabled-thinking-effort": ("auto",),
    "attention-config": ("{}",),
    "aux-output-config": ("{}",),
    "chat-template-content-format": ("auto", "string"),
    "code-revision": (),
    "config-format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu-offload-gb": ("0",),
    "custom-histogram-buckets": ("{}",),
    "data-parallel-rank": ("0",),
    "data-parallel-size-local": ("1",),
    "data-parallel-start-rank": ("0",),
    "decode-context-parallel-size": ("1",),
    "default-mm-loras": (),
    "device-ids": (),
    "diffusion-config": (),
    "distributed-executor-backend": ("uni", "mp"),
    "ec-transfer-config": (),
    "engram-config": (),
    "grpc-port": (),
    "hf-config-path": (),
    "io-processor-plugin": (),
    "kv-cache-dtype-skip-layers": (),
    "kv-events-config": (),
    "kv-transfer-config": (),
    "logits-processors": (),
    "logprobs-mode": ("raw_logprobs",),
    "lora-modules": (),
    "max-num-queued-tokens": (),
    "media-io-kwargs": ("{}",),
    "middleware": (),
    "mm-processor-kwargs": ("{}",),
    "model-class-overrides": ("{}",),
    "model-loader-extra-config": ("{}",),
    "nnodes": ("1",),
    "node-rank": ("0",),
    "num-speculative-tokens": (),
    "offload-group-size": ("0",),
    "override-pooler-config": (),
    "per-request-spec-decode-metrics": ("none",),
    "pipeline-parallel-size": ("1",),
    "pooler-config": (),
    "prefill-context-parallel-size": ("1",),
    "profiler-config": (),
    "qlora-adapter-name-or-path": (),
    "quantization-config": ("{}",),
    "reasoning-config": (),
    "reasoning-parser-plugin": (),
    "rope-scaling": (),
    "rope-theta": (),
    "runner": ("auto", "generate"),
    "scheduler-cls": (),
    "spec-method": (),
    "spec-model": (),
    "spec-tokens": (),
    "speculative-config": (),
    "speculative-model": (),
    "sse-keep-alive-interval": ("0",),
    "ssl-ciphers": (),
    "task": ("auto", "generate"),
    "tokenizer-mode": ("auto", "hf"),
    "tool-parser-plugin": (),
    "tool-server": (),
    "tool-strict-level": ("auto",),
    "watermark-config": (),
    "weight-transfer-config": (),
    "worker-cls": ("auto",),
    "worker-extension-cls": (),
}
# Keywords of vLLM's engines that its command line does not have.
_OTHER_KEYWORDS = (
    "enable_log_requests",
    "disable_log_requests",
    "logits_processor_pattern",
    "model_weights",
    "optimization_level",
    "override_attention_dtype",
    "performance_mode",
    "reasoning_parser",
)
_NO_EFFECT = frozenset(
    name.replace("-", "_") for name in (*NO_EFFECT_SWITCHES, *NO_EFFECT_VALUES, *NO_EFFECT_LISTS, *_OTHER_KEYWORDS)
)
_REFUSED: dict[str, tuple[str, ...]] = {
    **{name.replace("-", "_"): ("false",) for name in UNSUPPORTED_SWITCHES},
    **{name.replace("-", "_"): allowed for name, allowed in UNSUPPORTED_VALUES.items()},
}
_ANYWAY = frozenset(name.replace("-", "_") for name in ANYWAY_SWITCHES)


def check_foreign_keyword(name: str, value: Any) -> None:
    """Treats a keyword argument of other engines as the command line treats its flag.

    Raises:
        TypeError: there is no such argument.
        StartupError: it asks for what this engine does not do.
    """
    if name in _REFUSED:
        # An empty value or none asks for nothing.
        if value is not None and value not in ([], {}, ""):
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            said = value if isinstance(value, str) else json.dumps(value, default=str)
            refuse_unless_allowed(f"{name} =", said, _REFUSED[name])
    elif name in _NO_EFFECT:
        if value is not None and value is not False:
            logger.warning("%s has no effect in this engine.", name)
    elif name not in _ANYWAY:
        raise TypeError(f"EngineArgs has no argument {name!r}.")


def refuse_unless_allowed(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Raises StartupError for a value that is not among those which mean what this server does anyway."""
    if value is not None and _plain(value) in map(_plain, allowed):
        return
    if allowed and value is not None:
        raise StartupError(f"{option} {value} is not supported by this server; only {' or '.join(allowed)} is.")
    raise StartupError(f"{option.removesuffix(' =')} is not supported by this server; start it without.")


def _plain(value: str) -> tuple[type, Any]:
    """What a value says, however it is spelled: JSON parsed, names in lower case; and its type, for True equals 1."""
    try:
        said = json.loads(value)
    except ValueError:
        said = value.lower()
    return type(said), said
