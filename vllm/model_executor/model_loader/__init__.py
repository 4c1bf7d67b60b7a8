"""Weights from disk, one tensor at a time, under their Hugging Face names."""

from vllm.model_executor.model_loader.loader import iterate_weights

__all__ = ["iterate_weights"]
