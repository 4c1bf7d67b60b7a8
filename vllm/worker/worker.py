"""One rank of the engine: owns the device, the weights and the KV memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vllm.attention.backends import get_backend
from vllm.attention.backends.cpu import CpuAttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.exceptions import StartupError
from vllm.kv_cache.windows import KVMemory
from vllm.logger import init_logger
from vllm.model_executor.cpu_program import CpuProgram, misfit_of_sizes
from vllm.model_executor.layers.quantization.cpu_packed import CpuPacked
from vllm.model_executor.layers.quantization.select import (
    Fp8Format,
    GGUFFormat,
    Int4Format,
    QuantizationConfig,
    quantization_of_model,
)
from vllm.model_executor.layers.quantization.unquantized import Unquantized
from vllm.model_executor.model_loader.gguf_blocks import blocks_for_cpu
from vllm.model_executor.model_loader.load import load_model
from vllm.model_executor.models.base import CausalLM
from vllm.model_executor.models.decoder import Build, Decoder, attention_specs
from vllm.model_executor.models.registry import decoder_spec
from vllm.model_executor.models.spec import DecoderSpec
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.platforms import current_platform
from vllm.platforms.devices import gpu_generation, is_gpu
from vllm.step import PROMPT_ROWS, StepPlan, StepResult
from vllm.system_prompt_store import SnapshotRecord, SnapshotStore, snapshot_identity
from vllm.worker.cache_engine import CacheEngine
from vllm.worker.model_runner import ModelRunner
from vllm.worker.running_step import RunningStep
from vllm.worker.transfers import ExtentTransfers

logger = init_logger(__name__)


class Worker:
    """Loads the model at construction; `initialize_cache` makes it ready to execute plans.

    Raises:
        StartupError: the checkpoint does not fit its configuration, or the machine is too small.
    """

    def __init__(self, config: VllmConfig, tp: TensorParallelGroup | None = None) -> None:
        self.config = config
        self.tp = tp or TensorParallelGroup()
        self.platform = current_platform(config.device)
        ranked = is_gpu(torch.device(config.device)) and self.tp.world_size > 1
        self.device = torch.device(config.device, self.tp.rank) if ranked else torch.device(config.device)
        self.dtype = getattr(torch, config.model.dtype)
        self.spec: DecoderSpec | None = None
        if config.model.impl == "vllm":
            self.spec = decoder_spec(config.model.hf_config, config.model.max_model_len)
        try:
            wishes = self._attention_specs()
        except ValueError as error:
            raise StartupError(f"{config.model.model} cannot be built: {error}.") from None
        self.backend = get_backend(config.attention_backend, wishes, config.cache.block_size, self.device)
        if not is_gpu(self.device):
            torch.set_num_threads(self.platform.take_processors(self.tp.rank, self._processes_of_host()))
        started = time.perf_counter()
        try:
            build = self._build()
            self.model = load_model(
                config.model, lambda: self._make_model(build), self.dtype, self.device, build.quantization
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise StartupError(
                f"Not enough memory for the weights of {config.model.model} in {config.model.dtype}: {error}"
            ) from None
        logger.info(
            "Weights loaded in %.1f s (%s, %s).", time.perf_counter() - started, config.model.dtype, self.device
        )
        rules = () if build.quantization is None else build.quantization.rules
        in_blocks = any(isinstance(rule.format, GGUFFormat | Int4Format) for rule in rules)
        self._in_blocks = in_blocks and isinstance(build.method, CpuPacked)
        self._is_packed = isinstance(build.method, CpuPacked) or isinstance(self.backend, CpuAttentionBackend)
        self.runner: ModelRunner | None = None
        self.transfers: ExtentTransfers | None = None
        self._step_bytes = 0
        self._snapshots: list[SnapshotRecord] = []

    def _processes_of_host(self) -> int:
        """Ranks of all engines, which share what the host has."""
        return self.tp.world_size * self.config.parallel.data_parallel_size

    def _attention_specs(self) -> Sequence[AttentionSpec]:
        if self.spec is not None:
            return attention_specs(self.spec, self.tp, self.dtype)
        if self.tp.world_size > 1:
            raise ValueError("transformers' code runs on one rank")
        from vllm.model_executor.models.transformers_fallback import TransformersModel

        with torch.device("meta"):
            return TransformersModel(self.config.model.hf_config, self.dtype).attention_specs

    def _make_model(self, build: Build) -> CausalLM:
        if self.spec is not None:
            return Decoder(self.spec, build)
        from vllm.model_executor.models.transformers_fallback import TransformersModel  # loads much of transformers

        return TransformersModel(self.config.model.hf_config, self.dtype)

    def _build(self) -> Build:
        """How the network is made: packed for the compiled CPU kernels where they serve, and where its sizes fit.

        Raises:
            StartupError: int8 was asked for, and they do not.
        """
        config = self.config
        packs = config.attention_backend.upper() == "CPU" and cpu_kernels.library() is not None
        int8 = config.model.quantization == "int8_cpu"
        if int8 and not packs:
            raise StartupError(
                f"--quantization {config.model.quantization} is of the compiled CPU kernels, which do not serve here "
                f"(--device {config.device}, --attention-backend {config.attention_backend}); leave it out."
            )
        quantization = quantization_of_model(config.model)
        kernels = is_gpu(self.device) and gpu_generation(self.device) >= (9, 0) and self.dtype.itemsize == 2
        if quantization is not None and not kernels:
            self._check_dequantised(quantization, packs)
        plain = Build(
            self.tp, Unquantized(), config.model.max_model_len, self.dtype, quantization=quantization, kernels=kernels
        )
        if not packs:
            return plain
        if self.spec is None:
            if int8:
                raise StartupError(
                    f"--quantization {config.model.quantization} serves networks of this package only, not "
                    "transformers' code (--model-impl); leave it out."
                )
            logger.info("The layers of this model are computed by transformers' own code.")
            return plain
        misfit = misfit_of_sizes(self.spec, self.tp.world_size, self.dtype)
        if misfit is not None:
            if int8:
                raise StartupError(f"--quantization {config.model.quantization} cannot serve this model: {misfit}.")
            logger.warning("The compiled CPU kernels do not multiply by the weights of this model: %s.", misfit)
            return plain
        misfit = "it is split over ranks" if self.tp.world_size > 1 else CpuProgram.misfit(self.spec)
        if misfit is not None:
            logger.info("The layers of this model are computed one by one: %s.", misfit)
        compiled = misfit is None and isinstance(self.backend, CpuAttentionBackend)
        if config.model.load_format == "gguf" and not int8:
            quantization = blocks_for_cpu(config.model.model_path, self.spec, self.tp.world_size)
        return replace(plain, method=CpuPacked(int8), compiled=compiled, quantization=quantization)

    def _check_dequantised(self, quantization: QuantizationConfig, packs: bool) -> None:
        """Says that weights are dequantised.

        Args:
            packs: The compiled CPU kernels serve; they take 4-bit weights whose groups are neighbours.

        Raises:
            StartupError: weights would be quantised at load for kernels that are not here.
        """
        if packs and all(isinstance(r.format, Int4Format) and not r.format.act_order for r in quantization.rules):
            return
        if any(isinstance(rule.format, Fp8Format) and rule.format.at_load for rule in quantization.rules):
            raise StartupError(
                "--quantization fp8 of whole weights needs an NVIDIA GPU of generation 9.0 (Hopper) or newer and "
                "--dtype bfloat16 or float16; leave it out."
            )
        logger.info(
            "Weights quantised by %s become %s as they are loaded: there are no kernels for them here.",
            quantization.method,
            self.config.model.dtype,
        )

    def kv_memory(self) -> KVMemory:
        """What this rank has for KV, weights loaded and room kept for the largest step."""
        return self._memory(self.available_kv_bytes())

    def _memory(self, available: int) -> KVMemory:
        return KVMemory.of(available, self.model.caches(), self.config.cache.block_size)

    def available_kv_bytes(self) -> int:
        """Bytes that the KV cache may take on this rank, weights loaded and room kept for the largest step."""
        available = self.platform.available_kv_bytes(
            self.config.cache.gpu_memory_utilization, self._processes_of_host()
        )
        if is_gpu(self.device):
            self._step_bytes = self._bytes_of_largest_step()
        return max(0, available - self._step_bytes)

    def _bytes_of_largest_step(self) -> int:
        """Memory beside weights and KV cache, by a trial of a step of as many tokens and sequences as may be; it also
        compiles the kernels.

        Raises:
            StartupError: there is not so much.
        """
        scheduler = self.config.scheduler
        try:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            num_blocks = -(-scheduler.max_num_batched_tokens // self.config.cache.block_size)
            # Of one group: where blocks lie makes no difference to a trial.
            trial = self._make_runner(num_blocks)
            bytes_per_block = CacheEngine.bytes_per_block(self.model.caches(), self.config.cache.block_size)
            capture = not self.config.enforce_eager
            num_logprobs = self.config.model.max_logprobs
            trial.try_largest_step(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, capture, num_logprobs)
            needed = torch.cuda.max_memory_allocated() - before - num_blocks * bytes_per_block
        except torch.OutOfMemoryError as error:
            raise self._step_too_large(error) from None
        del trial
        torch.cuda.empty_cache()
        # Captured steps have at most 1,024 tokens, and memory of their own.
        return needed + needed // 4 if capture else needed

    def _make_runner(self, num_blocks: int, num_window_blocks: int = 0) -> ModelRunner:
        model, scheduler = self.config.model, self.config.scheduler
        kv = CacheEngine(
            layers=self.model.caches(),
            num_blocks=num_blocks,
            num_window_blocks=num_window_blocks,
            block_size=self.config.cache.block_size,
            max_num_seqs=scheduler.max_num_seqs + PROMPT_ROWS,
            max_blocks_per_seq=-(-model.max_model_len // self.config.cache.block_size) + 1,
            device=self.device,
        )
        return ModelRunner(
            self.model, kv, self.backend, model.vocab_size, scheduler.max_num_seqs, model.max_model_len, self.device
        )

    def initialize_cache(self, num_blocks: int, num_window_blocks: int = 0) -> None:
        """Makes the K/V tensors of so many blocks of each group, and the host tier, and looks for snapshots.

        Raises:
            StartupError: there is not enough memory.
        """
        sizes = self._memory(0)
        needed = num_blocks * sizes.block_bytes + num_window_blocks * sizes.window_block_bytes
        left = self.platform.available_memory_bytes() - self._step_bytes
        if needed > left:
            # A CPU would hand out the memory and be killed for using it.
            raise self._too_large(needed, f"{left / 2**30:.1f} GiB are left")
        try:
            self.runner = self._make_runner(num_blocks, num_window_blocks)
        except (MemoryError, RuntimeError) as error:
            raise self._too_large(needed, str(error).splitlines()[0]) from None
        self.transfers = self._open_tiers(self.runner.cache, sizes)
        if is_gpu(self.device) and not self.config.enforce_eager:
            scheduler = self.config.scheduler
            try:
                self.runner.capture_graphs(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
            except torch.OutOfMemoryError as error:
                raise self._step_too_large(error) from None
        self.transfers.start()

    def _step_too_large(self, error: torch.OutOfMemoryError) -> StartupError:
        scheduler = self.config.scheduler
        return StartupError(
            f"There is no memory for steps of {scheduler.max_num_batched_tokens} tokens and {scheduler.max_num_seqs} "
            f"sequences beside the weights and the KV cache ({str(error).splitlines()[0]}); lower "
            "--gpu-memory-utilization, --max-num-batched-tokens or --max-num-seqs."
        )

    def _open_tiers(self, kv: CacheEngine, memory: KVMemory) -> ExtentTransfers:
        tiers, model = self.config.system_prompt, self.config.model
        host_blocks = tiers.host_blocks(memory.block_bytes, self.tp.world_size)
        size = host_blocks * memory.block_bytes
        left = self.platform.available_host_memory_bytes()
        if size > left:
            raise StartupError(
                f"--system-prompt-host-cache-gib asks for {size / 2**30:.1f} GiB of host "
                f"memory, but only {left / 2**30:.1f} GiB are left; lower it."
            )
        if host_blocks:
            logger.info("System prompts may take %.1f GiB of host memory, as they come to need it.", size / 2**30)
        store = None
        if tiers.snapshot_dir is not None:
            identity = snapshot_identity(
                model,
                kv_dtype=model.dtype,
                arithmetic=self._arithmetic(),
                layout=self.backend.kv_layout,
                block_size=self.config.cache.block_size,
                block_bytes=kv.block_bytes(),
                num_window_tensors=0 if kv.window is None else len(kv.window.tensors),
                rank=self.tp.rank,
                num_ranks=self.tp.world_size,
            )
            store = SnapshotStore(Path(tiers.snapshot_dir).expanduser() / "snapshots", identity, tiers.snapshot_bytes)
            self._snapshots = store.scan()
        return ExtentTransfers(kv, host_blocks, store)

    def _arithmetic(self) -> str:
        """How this rank multiplies, where a processor has several ways that round differently: which of them is fastest
        is measured at each start, and need not be the same one; and whether weights stay in blocks, and so are not
        rounded to the dtype."""
        narrow = self.dtype != torch.float32 or self.config.model.quantization == "int8_cpu"
        ways = [str(cpu_kernels.arithmetic())] if narrow and self._is_packed else []
        return " ".join([*ways, "in blocks"] if self._in_blocks else ways)

    def snapshots(self) -> list[SnapshotRecord]:
        """What this rank has on disk, the last used first."""
        return self._snapshots

    @staticmethod
    def _too_large(num_bytes: int, why: str) -> StartupError:
        return StartupError(
            f"A KV cache of {num_bytes / 2**30:.1f} GiB does not fit in memory ({why}); lower --kv-cache-memory-bytes, "
            "--num-gpu-blocks-override or --gpu-memory-utilization."
        )

    def submit(self, plan: StepPlan) -> RunningStep:
        """Starts a step; see `Executor.submit`."""
        if self.runner is None or self.transfers is None:
            raise RuntimeError("initialize_cache() has not been called")
        transfers, patience = self.transfers, plan.job_patience_s
        # Copies of the step before run beside it; nothing of this one may come before they are done.
        transfers.join()
        self.runner.apply(plan)
        applied = transfers.mark()
        draw = self.runner.run(plan)
        transfers.begin(plan, applied)

        def look(result: StepResult) -> StepResult:
            if patience is not None:
                result.ended_jobs = transfers.ended_jobs(patience)
            return result

        return RunningStep(draw, bool(plan.masked), look)

    def shutdown(self) -> None:
        """Ends this rank; snapshots that are being written are finished."""
        if self.transfers is not None:
            self.transfers.close()
        self.runner = None
