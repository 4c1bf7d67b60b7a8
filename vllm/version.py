"""Version of the distribution `vllm-system-prompt-cache`."""

__version__ = "0.1.0"
