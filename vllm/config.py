"""What the engine runs, resolved once at start-up and never changed afterwards.

`EngineArgs.create_engine_config()` turns command-line values into these; no module below the entry points reads flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig
else:
    # Whoever reads these values as messages brings the class, which is slow to import.
    PretrainedConfig = Any

SystemPromptMode = Literal["auto", "declared", "off"]
SchedulingPolicy = Literal["fcfs", "priority"]
SystemPromptMarkers = Literal["off", "soft", "hard"]


@dataclass(frozen=True)
class ModelConfig:
    """The checkpoint and how it is read.

    Attributes:
        model: What the user named (path or hub id); shown in logs.
        model_path: Local directory, or a `.gguf` file.
        tokenizer_path: Local directory or `.gguf` file that the tokenizer is read from.
        served_model_names: Names under which the HTTP API knows the model; the first one is reported back.
        hf_config: Shape of the network.
        dtype: Name of the torch dtype of weights and activations.
        quantization: How the matrices are quantised, by the name of `--quantization`; None: they are whole.
        max_model_len: Longest prompt plus output of a request, in tokens.
        load_format: Where weights come from.
        impl: Whose code computes the network.
        seed: Seed of the engine's own draws, or None for fresh entropy.
        chat_template: Template text that replaces the tokenizer's own, or None.
        weights_digest: SHA-256 over what identifies the weights, their quantization included; seeds the keys of cached
            blocks.
        tokenizer_digest, chat_template_digest: SHA-256 of what turns text into tokens; snapshots are kept apart by it.
        eos_token_ids: Tokens that end an answer unless the request says `ignore_eos`.
        generation_defaults: Sampling values that the checkpoint's generation_config.json recommends; the HTTP API
            uses them where a request is silent.
        structured_outputs_backend: Which engine takes JSON schemas.
    """

    model: str
    model_path: str
    tokenizer_path: str
    served_model_names: tuple[str, ...]
    hf_config: PretrainedConfig
    dtype: str
    max_model_len: int
    load_format: Literal["gguf", "safetensors", "dummy"]
    impl: Literal["vllm", "transformers"] = "vllm"
    quantization: str | None = None
    seed: int | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    trust_remote_code: bool = False
    max_logprobs: int = 20
    weights_digest: str = ""
    tokenizer_digest: str = ""
    chat_template_digest: str = ""
    eos_token_ids: tuple[int, ...] = ()
    structured_outputs_backend: Literal["auto", "guidance", "xgrammar"] = "auto"
    generation_defaults: dict[str, float] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return int(self.hf_config.vocab_size)


@dataclass(frozen=True)
class CacheConfig:
    """KV memory.

    Attributes:
        block_size: Slots in a block.
        num_blocks: Blocks in the cache; None until the worker has measured what fits.
        kv_cache_memory_bytes: Bytes for K and V together; None lets the worker choose.
        gpu_memory_utilization: Share of the device's memory that the engine may use.
        enable_prefix_caching: Keep and reuse full blocks of suffixes.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True


@dataclass(frozen=True)
class SystemPromptConfig:
    """The pinned pool.

    Attributes:
        mode: `auto` pins every chat request's system part, `declared` only what an operator added, `off` nothing.
        budget_tokens: Most tokens that pinned extents may take; None means `budget_fraction` of the KV cache.
        budget_fraction: Share of the KV cache that pinned extents may take.
        min_tokens: Shorter system prompts run unpinned.
        private: What requests bring is pinned for each API key by itself; only an operator's prompts are for all.
        markers: What becomes of prefixes that requests mark (`cache_control`): `soft` pins, which give way to hard
            ones, `hard` pins, or nothing (`off`).
        ttl: Seconds after its last use when an automatic pin ends; None keeps it.
        snapshot_dir: Folder in which snapshots of pinned prompts outlive the server; None keeps none.
        snapshot_bytes: Most bytes that they take.
        host_bytes: Host memory for prompts that the budget has no room for.
        copy_bytes: Bytes that a step copies between device and host.
    """

    mode: SystemPromptMode = "auto"
    budget_tokens: int | None = None
    budget_fraction: float = 0.5
    min_tokens: int = 1
    ttl: float | None = None
    private: bool = False
    markers: SystemPromptMarkers = "soft"
    snapshot_dir: str | None = None
    snapshot_bytes: int = 0
    host_bytes: int = 0
    copy_bytes: int = 8 << 20

    def host_blocks(self, block_bytes: int, num_ranks: int) -> int:
        """Blocks of the host tier, given the bytes of one on each rank."""
        return self.host_bytes // (block_bytes * num_ranks)


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step, and who comes first.

    Attributes:
        max_num_seqs: Most sequences that run together.
        max_num_batched_tokens: Most tokens computed in one step.
        policy: `fcfs` serves requests in the order in which they come, `priority` those of the lowest number first.
        max_num_queued_reqs: Most outputs that wait or run before the server turns requests away; None for no limit.
        long_prefill_token_threshold: Most tokens of one prompt in a step in which others get their next tokens, so that
            a long prompt does not hold up their streams; None for no limit.
        max_outputs_beside_others: Most outputs of one request that run beside those of others; None for no limit.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: SchedulingPolicy = "fcfs"
    max_num_queued_reqs: int | None = None
    long_prefill_token_threshold: int | None = None
    max_outputs_beside_others: int | None = None


@dataclass(frozen=True)
class ParallelConfig:
    """How many processes compute.

    Attributes:
        tensor_parallel_size: Ranks that share one model.
        data_parallel_size: Engines of a server, each with the whole model.
    """

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1


@dataclass(frozen=True)
class VllmConfig:
    """All of the above; what every part of the engine is built from."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    system_prompt: SystemPromptConfig = field(default_factory=SystemPromptConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: str = "cpu"
    attention_backend: str = "TORCH"
    enforce_eager: bool = False
