"""What the rest of the package may ask about a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Platform(ABC):
    """One kind of device.

    Attributes:
        device_type: Name of the torch device: `cpu` or `cuda`.
        pipeline_depth: Steps that may be in flight: 2 where the host is free while the device computes.
    """

    device_type: ClassVar[str]
    pipeline_depth: ClassVar[int]

    @abstractmethod
    def default_dtype(self, hf_dtype: object, is_quantised_gguf: bool = False) -> str:
        """Name of the torch dtype to compute in when the user leaves it to us.

        Args:
            hf_dtype: What the checkpoint's configuration says: a torch dtype, its name, or None.
            is_quantised_gguf: The weights are dequantised, so that no stored dtype recommends itself.
        """

    @abstractmethod
    def total_memory_bytes(self) -> int:
        """Memory that this process could ever use on the device."""

    @abstractmethod
    def available_memory_bytes(self) -> int:
        """Memory that this process could take now."""

    @abstractmethod
    def available_host_memory_bytes(self) -> int:
        """Memory of the host, not of the device, that this process could take now."""

    @abstractmethod
    def available_kv_bytes(self, utilization: float, num_ranks: int = 1) -> int:
        """Memory that the KV cache of each rank may take once the weights are loaded, by default.

        Args:
            utilization: Share of the memory that the whole engine may use, 0 … 1.
            num_ranks: Ranks on this host.
        """

    @abstractmethod
    def take_processors(self, rank: int, num_ranks: int) -> int:
        """Keeps this rank to its processors, if it is to have some for itself; returns how many threads it should
        compute with on the host.

        Raises:
            StartupError: what says which ones cannot be followed.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all work submitted to the device is done."""

    def attention_backend(self) -> str:
        """Name of the attention backend used unless the user names another."""
        return "TORCH"


def dtype_name(hf_dtype: object) -> str | None:
    """`torch.bfloat16` or `"bfloat16"` → `"bfloat16"`; None stays None."""
    return None if hf_dtype is None else str(hf_dtype).removeprefix("torch.")
