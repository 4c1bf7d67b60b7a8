"""Networks by architecture name."""

from vllm.model_executor.models.llama import LlamaForCausalLM

MODELS: dict[str, type[LlamaForCausalLM]] = {"LlamaForCausalLM": LlamaForCausalLM}
