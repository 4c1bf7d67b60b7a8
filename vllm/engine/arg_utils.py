"""Engine flags: their names, defaults and limits, and how they become a `VllmConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jinja2

from vllm import envs
from vllm.config import (
    CacheConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SchedulingPolicy,
    SystemPromptConfig,
    SystemPromptMarkers,
    SystemPromptMode,
    VllmConfig,
)
from vllm.engine.foreign_args import check_foreign_keyword
from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.platforms.base import Platform
from vllm.transformers_utils.config import (
    SAMPLING_KEYS,
    eos_token_ids,
    load_generation_config,
    load_hf_config,
    model_impl_of,
    resolve_model,
    weights_digest,
)
from vllm.transformers_utils.gguf import gguf_file
from vllm.transformers_utils.quantization_config import METHODS, method_name, quantization_of
from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer

logger = init_logger(__name__)

_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
_DTYPE_NAMES = {"half": "float16", "float": "float32"}
_BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MAX_SEQS = 65_536
# Names that vLLM gives to its attention kernels.
_OTHER_BACKENDS = (
    "AUTO",
    "CPU_ATTN",
    "CUTLASS_MLA",
    "FLASHINFER",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASH_ATTN",
    "FLASH_ATTN_MLA",
    "FLEX_ATTENTION",
    "ROCM_AITER_FA",
    "ROCM_AITER_UNIFIED_ATTN",
    "ROCM_ATTN",
    "TORCH_SDPA",
    "TREE_ATTN",
    "TRITON_ATTN",
    "TRITON_MLA",
)

# Tokens of a step by default. On a CPU a GEMM is at full speed from a few hundred rows, and a smaller step keeps the
# gaps between the tokens of running requests short; a GPU needs more rows to be busy.
# On an H100 twice 32 tokens for each of its 132 multiprocessors: tiles of matrix products then come out even. 262,144
# tokens of prompts take 5.84 s, by steps of 8,192 tokens 5.95 s.
_BATCHED_TOKENS = {"cpu": 512, "cuda": 8448}

# What one request may add to a step in which others get their next tokens, so that neither its prompt nor its many
# outputs hold up their streams: some 50 ms, of the default model on 2 cores and of Llama-3.1-8B on an H100.
_PREFILL_BESIDE_STREAMS = {"cpu": 64, "cuda": 2048}
_OUTPUTS_BESIDE_OTHERS = {"cpu": 8, "cuda": None}

# What a decode step copies between device and host for prompts that change tiers, so that no token comes much later for
# it: some 2 ms of a CPU's time beside decode steps of 10 ms and more, and as much of a GPU's link, at 32 GB/s.
_COPY_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}

# Of the host's free memory: with it, two servers on one host do not take more than there is, and as much is left for
# what reads weights and for the page cache.
_HOST_SHARE = 0.4


@dataclass(init=False)
class EngineArgs:
    """Engine flags; `None` means that the engine chooses. See `vllm serve --help` for each.

    Keywords of vLLM's engines that this one has no use for are treated as the command line treats their flags.

    Raises:
        TypeError: a keyword is known to neither.
        StartupError: it asks for what this engine does not do.
    """

    model: str | None = None
    tokenizer: str | None = None
    served_model_name: list[str] | str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    hf_token: str | bool | None = None
    hf_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    load_format: Literal["auto", "gguf", "safetensors", "dummy"] = "auto"
    model_impl: Literal["auto", "vllm", "transformers"] = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    seed: int | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    trust_remote_code: bool = False
    generation_config: str = "auto"
    override_generation_config: dict[str, float] = dataclasses.field(default_factory=dict)
    max_logprobs: int = 20
    structured_outputs_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_num_queued_reqs: int | None = None
    long_prefill_token_threshold: int | None = None
    scheduling_policy: SchedulingPolicy = "fcfs"
    system_prompt_cache: SystemPromptMode = "auto"
    system_prompt_cache_tokens: int | None = None
    system_prompt_cache_fraction: float = 0.5
    system_prompt_min_tokens: int = 1
    system_prompt_ttl: float | None = None
    system_prompt_private: bool = False
    system_prompt_markers: SystemPromptMarkers = "soft"
    system_prompt_cache_dir: str | None = None
    system_prompt_cache_dir_gib: float = 20.0
    system_prompt_host_cache_gib: float | Literal["auto"] = "auto"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    device: str = "auto"
    attention_backend: str | None = None
    enforce_eager: bool = False
    disable_log_stats: bool = False

    def __init__(self, model: str | None = None, **values: Any) -> None:
        self.model = model
        for field in dataclasses.fields(self)[1:]:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            given = values.pop(field.name, None)
            setattr(self, field.name, default if given is None else given)
        for name, value in values.items():
            check_foreign_keyword(name, value)

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> EngineArgs:
        """Takes the engine's own values out of parsed arguments."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{n: getattr(namespace, n) for n in names if hasattr(namespace, n)})

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds the engine's flags, in groups."""
        default = EngineArgs()

        def adder(title: str) -> Any:
            group = parser.add_argument_group(title)

            def add(name: str, text: str, *aliases: str, **options: Any) -> None:
                value = getattr(default, name)
                if isinstance(value, bool):
                    options["action"] = argparse.BooleanOptionalAction
                elif value is not None:
                    text += " (default: %(default)s)"
                group.add_argument(f"--{name.replace('_', '-')}", *aliases, default=value, help=text, **options)

            return add

        add = adder("model")
        add("model", "Hugging Face directory, .gguf file or hub id; without it, the default model.")
        add("tokenizer", "Directory or .gguf file to read the tokenizer from; the model's own if not given.")
        add("served_model_name", "Name or names the API knows the model by.", nargs="+")
        add("revision", "Branch, tag or commit of a hub id.")
        add("tokenizer_revision", "The same for the tokenizer; that of the model if not given.")
        add("download_dir", "Folder in which models from the hub are kept; the hub's own cache if not given.")
        add("hf_token", "Token for the hub, or that of `hf auth login` without a value.", nargs="?", const=True)
        add("hf_overrides", "Values that win over the model's config.json, as a JSON object.", type=_json_object)
        add("load_format", "How the weights are stored; dummy makes random ones.", choices=_choices("load_format"))
        add(
            "model_impl",
            "vllm: networks of this package; transformers: its own code; auto: that where there is no other.",
            choices=_choices("model_impl"),
        )
        add("dtype", "Of weights and activations.", choices=_DTYPES)
        add(
            "quantization",
            "fp8: whole weights as 8-bit floats; int8_cpu: as int8, on a CPU. Checkpoints that are quantised need no "
            f"flag; their methods ({', '.join(METHODS)}) may be named.",
            type=method_name,
        )
        add("max_model_len", "Longest prompt plus output, in tokens; 8k and 8K are understood.", type=_human_int)
        add("seed", "Of the engine's own draws; fresh entropy if not given.", type=int)
        add("chat_template", "Template text, or a file that holds it, in place of the tokenizer's own.")
        add("trust_request_chat_template", "Let requests bring a chat_template of their own.")
        add("trust_remote_code", "Run code that a checkpoint's tokenizer brings.")
        add(
            "generation_config", "auto: sampling defaults of the checkpoint; vllm: none; or a folder to take them from."
        )
        add(
            "override_generation_config", "Sampling defaults that win over those, as a JSON object.", type=_json_numbers
        )
        add(
            "max_logprobs",
            "Most log-probabilities a token that a request may ask for; -1: all of the vocabulary, megabytes a token.",
            type=int,
        )
        add(
            "structured_outputs_config",
            'As a JSON object: {"backend": ...}, which engine keeps JSON schemas: auto (llguidance, and xgrammar for '
            "what that does not take), guidance or xgrammar.",
            type=_json_object,
        )
        add = adder("KV cache")
        add("block_size", "Tokens in a KV block.", type=int)
        add("num_gpu_blocks_override", "Blocks of the KV cache, on any device; overrides what was measured.", type=int)
        add("kv_cache_memory_bytes", "Bytes of the KV cache; 4G is understood.", type=_human_int)
        add("kv_cache_dtype", "Only auto, that of the model, exists in this version.")
        add(
            "gpu_memory_utilization",
            "Share of the device's memory that the engine may use.",
            "--device-memory-utilization",
            type=float,
        )
        add("enable_prefix_caching", "Reuse the KV of what requests have in common after their system prompt.")
        add = adder("scheduler")
        add("max_num_seqs", "Most sequences that run together.", type=int)
        add("max_num_batched_tokens", "Most tokens computed in a step.", type=_human_int)
        add(
            "max_num_queued_reqs",
            "Most requests that wait or run, each of its n outputs counted; what comes beyond is answered 503. "
            "No limit if not given.",
            type=_human_int,
        )
        add(
            "long_prefill_token_threshold",
            "Most tokens of one prompt in a step in which others get their next tokens; 0: no limit. "
            f"Default: {_PREFILL_BESIDE_STREAMS['cuda']}, on a CPU {_PREFILL_BESIDE_STREAMS['cpu']}.",
            type=_human_int,
        )
        add(
            "scheduling_policy",
            "fcfs: first come first served, whatever a request's priority; priority: lowest priority first.",
            choices=_choices("scheduling_policy"),
        )
        add = adder("system prompts")
        add("system_prompt_cache", "auto pins every system prompt, declared only added ones.", choices=_choices("mode"))
        add("system_prompt_cache_tokens", "Most tokens pinned together; wins over the fraction.", type=_human_int)
        add("system_prompt_cache_fraction", "Share of the KV cache that may be pinned.", type=float)
        add("system_prompt_min_tokens", "Shorter system prompts run unpinned.", type=int)
        add("system_prompt_ttl", "Seconds unused after which an automatic pin ends; never if not given.", type=float)
        add("system_prompt_private", "Pin what requests bring for each API key by itself.")
        add(
            "system_prompt_markers",
            "What becomes of prefixes that requests mark (cache_control, prompt_cache_retention): soft pins, which "
            "give way to hard ones; hard pins; or off, nothing.",
            choices=("off", "soft", "hard"),
        )
        add("system_prompt_cache_dir", "Folder for snapshots of pinned prompts, which outlive a restart.")
        add("system_prompt_cache_dir_gib", "Most GiB that snapshots take; the longest unused go first.", type=float)
        add(
            "system_prompt_host_cache_gib",
            "Host memory for prompts that do not fit the pool's budget; auto takes, as it is used, up to 40 %% of what "
            "is free beside a GPU, and none on a CPU.",
            type=_gib_or_auto,
        )
        add = adder("device and ranks")
        add("device", "auto, cpu or cuda.")
        add("tensor_parallel_size", "Ranks that share the model: one GPU each, or a process each on a CPU.", type=int)
        add("data_parallel_size", "Engines behind one port, each with the whole model.", type=int)
        add("attention_backend", "TORCH, or the device's: CPU, TRITON, XFORMERS; the device's own choice if not given.")
        add("enforce_eager", "Never capture CUDA graphs.")
        add = adder("logging")
        add("disable_log_stats", "Do not say every 10 s what the engine does.")
        return parser

    def create_engine_config(self) -> VllmConfig:
        """What `resolve` settles, without the tokenizer that it had to load for that."""
        return self.resolve()[0]

    def resolve(self) -> tuple[VllmConfig, Tokenizer]:
        """Finds the model, reads what it says about itself and settles every value.

        Raises:
            StartupError: a value is not allowed, or the model is not there or not supported.
        """
        self._check_ranges()
        platform = current_platform(self.device)
        needs_weights = self.load_format != "dummy"
        fetch = partial(resolve_model, download_dir=self.download_dir, token=self.hf_token)
        display_name, model_path = fetch(self.model, self.revision, needs_weights)
        tokenizer_path = model_path
        if self.tokenizer is not None or self.tokenizer_revision not in (None, self.revision):
            name = self.tokenizer or self.model
            tokenizer_path = fetch(name, self.tokenizer_revision, False)[1]
        # Both the tokenizer and the configuration may come from it.
        held = gguf_file(model_path) if model_path.endswith(".gguf") else None
        tokenizer = load_tokenizer(tokenizer_path, self.trust_remote_code)
        model = self._model_config(display_name, model_path, tokenizer_path, tokenizer, platform)
        if _DTYPE_NAMES.get(self.kv_cache_dtype, self.kv_cache_dtype) not in ("auto", model.dtype):
            raise StartupError(
                f"--kv-cache-dtype {self.kv_cache_dtype} is not built into this version; only auto is, which is the "
                f"model's own {model.dtype} here."
            )
        batched = self.max_num_batched_tokens or max(_BATCHED_TOKENS[platform.device_type], self.max_num_seqs)
        if batched < self.max_num_seqs:
            raise StartupError(
                f"--max-num-batched-tokens ({batched}) must be at least --max-num-seqs ({self.max_num_seqs})."
            )
        config = VllmConfig(
            model=model,
            cache=CacheConfig(
                block_size=self.block_size,
                num_blocks=self.num_gpu_blocks_override,
                kv_cache_memory_bytes=self.kv_cache_memory_bytes,
                gpu_memory_utilization=self.gpu_memory_utilization,
                enable_prefix_caching=self.enable_prefix_caching,
            ),
            system_prompt=SystemPromptConfig(
                mode=self.system_prompt_cache,
                budget_tokens=self.system_prompt_cache_tokens,
                budget_fraction=self.system_prompt_cache_fraction,
                min_tokens=self.system_prompt_min_tokens,
                ttl=self.system_prompt_ttl,
                private=self.system_prompt_private,
                markers=self.system_prompt_markers,
                snapshot_dir=self.system_prompt_cache_dir,
                snapshot_bytes=int(self.system_prompt_cache_dir_gib * 2**30),
                host_bytes=self._host_bytes(platform),
                copy_bytes=_COPY_BYTES[platform.device_type],
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=batched,
                policy=self.scheduling_policy,
                max_num_queued_reqs=self.max_num_queued_reqs,
                long_prefill_token_threshold=self._long_prefill_token_threshold(platform),
                max_outputs_beside_others=_OUTPUTS_BESIDE_OTHERS[platform.device_type],
            ),
            parallel=ParallelConfig(
                tensor_parallel_size=self.tensor_parallel_size, data_parallel_size=self.data_parallel_size
            ),
            device=platform.device_type,
            attention_backend=_attention_backend(self.attention_backend) or platform.attention_backend(),
            # The code of transformers is not made for being captured.
            enforce_eager=self.enforce_eager or model.impl == "transformers",
        )
        del held
        return config, tokenizer

    def _model_config(
        self, display_name: str, model_path: str, tokenizer_path: str, tokenizer: Tokenizer, platform: Platform
    ) -> ModelConfig:
        hf_config = load_hf_config(model_path, self.hf_overrides, self.model_impl)
        impl = model_impl_of(hf_config, self.model_impl)
        is_gguf = model_path.endswith(".gguf")
        load_format = self.load_format
        if load_format == "auto":
            load_format = "gguf" if is_gguf else "safetensors"
        elif load_format != "dummy" and (load_format == "gguf") != is_gguf:
            raise StartupError(f"--load-format {load_format} does not fit the model {display_name}.")
        if tokenizer.vocab_size > hf_config.vocab_size:
            raise StartupError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, the model only {hf_config.vocab_size}; "
                "they do not belong together (--tokenizer)."
            )
        template = _read_template(self.chat_template, tokenizer)
        if self.dtype == "auto":
            dtype = platform.default_dtype(getattr(hf_config, "dtype", None), is_gguf)
        else:
            dtype = _DTYPE_NAMES.get(self.dtype, self.dtype)
        quantization = self._quantization(hf_config, display_name, is_gguf)
        names = display_name if self.served_model_name is None else self.served_model_name
        if not all(names) or not names:
            raise StartupError("--served-model-name must not be empty.")
        return ModelConfig(
            model=display_name,
            model_path=model_path,
            tokenizer_path=tokenizer_path,
            served_model_names=(names,) if isinstance(names, str) else tuple(names),
            hf_config=hf_config,
            dtype=dtype,
            max_model_len=self._max_model_len(_positions(hf_config)),
            load_format=load_format,
            impl=impl,
            quantization=quantization,
            seed=self.seed,
            chat_template=template,
            trust_request_chat_template=self.trust_request_chat_template,
            trust_remote_code=self.trust_remote_code,
            max_logprobs=self._max_logprobs(int(hf_config.vocab_size)),
            weights_digest=weights_digest(model_path, quantization, impl),
            tokenizer_digest=tokenizer.digest() if self.system_prompt_cache_dir else "",
            chat_template_digest=_template_digest(template or tokenizer.hf.chat_template),
            eos_token_ids=eos_token_ids(model_path, hf_config, tokenizer),
            generation_defaults=self._generation_defaults(model_path),
            structured_outputs_backend=self._structured_outputs_backend(),
        )

    def _quantization(self, hf_config: Any, display_name: str, is_gguf: bool) -> str | None:
        """How the matrices are quantised, by the checkpoint or at load."""
        asked = method_name(self.quantization)
        if is_gguf and asked == "gguf":
            return None
        if asked == "gguf" or (is_gguf and asked == "fp8"):
            what = "a" if is_gguf else "no"
            raise StartupError(f"--quantization {asked} contradicts {display_name}, which is {what} GGUF file.")
        found = quantization_of(getattr(hf_config, "quantization_config", None), asked, display_name)
        return None if found is None else found.method

    def _structured_outputs_backend(self) -> Literal["auto", "guidance", "xgrammar"]:
        unknown = sorted(self.structured_outputs_config.keys() - {"backend"})
        if unknown:
            raise StartupError(f"--structured-outputs-config holds {', '.join(unknown)}; it may hold backend only.")
        backend = self.structured_outputs_config.get("backend", "auto")
        if backend not in ("auto", "guidance", "xgrammar"):
            raise StartupError(
                f"--structured-outputs-config.backend must be auto, guidance or xgrammar, got {backend!r:.64}."
            )
        return backend

    def _max_logprobs(self, vocab_size: int) -> int:
        return vocab_size if self.max_logprobs < 0 else min(self.max_logprobs, vocab_size)

    def _generation_defaults(self, model_path: str) -> dict[str, float]:
        source = model_path if self.generation_config == "auto" else self.generation_config
        if source not in (model_path, "vllm") and not (Path(source) / "generation_config.json").is_file():
            raise StartupError(
                f"--generation-config must be auto, vllm or a folder with generation_config.json, got {source}."
            )
        defaults = {} if source == "vllm" else load_generation_config(source)
        for name in self.override_generation_config:
            if name not in SAMPLING_KEYS:
                raise StartupError(
                    f"--override-generation-config holds {name}; it may hold {', '.join(SAMPLING_KEYS)}."
                )
        return defaults | {SAMPLING_KEYS[name]: value for name, value in self.override_generation_config.items()}

    def _max_model_len(self, declared: int) -> int:
        asked = self.max_model_len
        if asked is None:
            return declared
        if asked > declared and not envs.allow_long_max_model_len():
            raise StartupError(
                f"--max-model-len {asked} is more than the model's {declared} positions; lower it, or set "
                "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if you know that the model can do it."
            )
        return asked

    def _long_prefill_token_threshold(self, platform: Platform) -> int | None:
        asked = self.long_prefill_token_threshold
        return _PREFILL_BESIDE_STREAMS[platform.device_type] if asked is None else asked or None

    def _host_bytes(self, platform: Platform) -> int:
        """Host memory for system prompts."""
        if self.system_prompt_host_cache_gib != "auto":
            return int(self.system_prompt_host_cache_gib * 2**30)
        if platform.device_type == "cpu" or self.system_prompt_cache == "off":
            return 0  # A CPU's KV cache is host memory itself.
        return int(_HOST_SHARE * platform.available_host_memory_bytes()) // self.data_parallel_size

    def _check_ranges(self) -> None:
        if self.block_size not in _BLOCK_SIZES:
            raise StartupError(f"--block-size must be a power of two up to {_BLOCK_SIZES[-1]}, got {self.block_size}.")
        if self.scheduling_policy not in _choices("scheduling_policy"):
            raise StartupError(f"--scheduling-policy must be fcfs or priority, got {self.scheduling_policy}.")
        if self.dtype not in _DTYPES:
            raise StartupError(f"--dtype must be one of {', '.join(_DTYPES)}, got {self.dtype}.")
        limits: dict[str, tuple[float, float]] = {
            "max_model_len": (2, 2**31 - 1),
            "max_logprobs": (-1, 2**31 - 1),
            "num_gpu_blocks_override": (1, 2**31 - 1),
            "kv_cache_memory_bytes": (1, 2**60),
            "max_num_seqs": (1, _MAX_SEQS),
            "max_num_batched_tokens": (1, 2**31 - 1),
            "tensor_parallel_size": (1, 1024),
            "data_parallel_size": (1, 1024),
            "max_num_queued_reqs": (1, 2**31 - 1),
            "long_prefill_token_threshold": (0, 2**31 - 1),
            "system_prompt_cache_tokens": (0, 2**40),
            "system_prompt_cache_fraction": (0.0, 1.0),
            "system_prompt_min_tokens": (1, 2**31 - 1),
            "system_prompt_ttl": (0.001, 1e10),
            "system_prompt_cache_dir_gib": (0.0, 1e6),
            "system_prompt_host_cache_gib": (0.0, 1e6),
            "gpu_memory_utilization": (0.01, 1.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value == "auto" and name == "system_prompt_host_cache_gib":
                continue
            if value is not None and not low <= value <= high:
                raise StartupError(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}.")


AsyncEngineArgs = EngineArgs


def _attention_backend(name: str | None) -> str | None:
    """A backend of this engine; None, with a warning, for one of other engines: it would compute the same."""
    from vllm.attention.backends import BACKENDS  # loads torch, which --help need not wait for

    if name is None or name.upper() in BACKENDS:
        return name
    if name.upper() not in _OTHER_BACKENDS:
        raise StartupError(f"--attention-backend {name} is not known; choose from {', '.join(BACKENDS)}.")
    logger.warning("--attention-backend %s is not of this server; it takes the device's own choice.", name)
    return None


def _choices(name: str) -> tuple[str, ...]:
    return {
        "load_format": ("auto", "gguf", "safetensors", "dummy"),
        "mode": ("auto", "declared", "off"),
        "model_impl": ("auto", "vllm", "transformers"),
        "scheduling_policy": ("fcfs", "priority"),
    }[name]


def _positions(hf_config: Any) -> int:
    found = getattr(hf_config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise StartupError(
            f"The model (model type {hf_config.model_type!r}) does not say how long its sequences may be."
        )
    return found


def _human_int(text: str) -> int:
    """`8192`, `8k` (thousand), `8K` (1024), `4G` (2^30), `1.5M`."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    try:
        if text and text[-1] in units:
            return int(float(text[:-1]) * units[text[-1]])
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8192, 8k or 4G") from None


def _gib_or_auto(text: str) -> float | Literal["auto"]:
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of GiB") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")


def _json_numbers(text: str) -> dict[str, float]:
    """A JSON object whose values are numbers."""
    value = _json_object(text)
    if all(type(v) in (int, float) for v in value.values()):
        return value
    raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object of numbers such as {{"temperature": 0.2}}')


def _template_digest(value: object) -> str:
    """SHA-256 (hex) of a chat template, or of several by name."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _read_template(template: str | None, tokenizer: Tokenizer) -> str | None:
    """The template itself; `template` may also be the path of a file that holds it."""
    if template is None:
        return None
    if "{%" not in template and "{{" not in template:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise StartupError(
                f"--chat-template: {template} is neither a template nor a readable file ({error})."
            ) from None
    try:
        hello = [{"role": "user", "content": "Hello"}]
        tokenizer.hf.apply_chat_template(hello, chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise StartupError(f"--chat-template: {reason} (line {error.lineno} of the template).") from None
    except Exception:  # a template is a program that may refuse a chat as it likes
        logger.debug("The chat template refuses a chat of one user message.", exc_info=True)
    return template
