"""NVIDIA GPUs, through torch; figures are of the current device."""

from __future__ import annotations

from vllm.platforms.base import Platform, dtype_name
from vllm.platforms.cpu import CpuPlatform, usable_cpus


class CudaPlatform(Platform):
    device_type = "cuda"
    pipeline_depth = 2

    @staticmethod
    def is_available() -> bool:
        import torch

        return torch.cuda.is_available()

    def default_dtype(self, hf_dtype: object, is_quantised_gguf: bool = False) -> str:
        name = dtype_name(hf_dtype)
        if name is not None and not is_quantised_gguf:
            return name
        import torch

        # Nothing recommends a dtype: the 16-bit one with float32's range, where the tensor cores have it (Ampere on).
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"

    def total_memory_bytes(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[1])

    def available_memory_bytes(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[0])

    def available_host_memory_bytes(self) -> int:
        return CpuPlatform().available_memory_bytes()

    def available_kv_bytes(self, utilization: float, num_ranks: int = 1) -> int:
        free, total = self.available_memory_bytes(), self.total_memory_bytes()
        return max(0, int(free - (1 - utilization) * total))

    def take_processors(self, rank: int, num_ranks: int) -> int:
        return max(1, usable_cpus() // num_ranks)

    def attention_backend(self) -> str:
        return "TRITON"

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()
