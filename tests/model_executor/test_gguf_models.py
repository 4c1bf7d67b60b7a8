"""Networks from GGUF files: what llama.cpp's conversion stores comes back as what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.model_executor.networks import logits_of, make_decoder
from tests.model_executor.test_families import TOKENS, checkpoint, make_reference
from vllm.model_executor.model_loader import iterate_weights
from vllm.transformers_utils.architectures import ARCHITECTURES as SERVED_ARCHITECTURES
from vllm.transformers_utils.config import load_hf_config
from vllm.transformers_utils.gguf_config import ARCHITECTURES

MIXED_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 9}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# Name in GGUF, architecture at Hugging Face, its own values.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "LlamaForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen2", "Qwen2ForCausalLM", {"hidden_size": 64}),
    ("qwen3", "Qwen3ForCausalLM", {"rope_parameters": YARN}),
    ("gemma2", "Gemma2ForCausalLM", {**MIXED_WINDOWS, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    ("gemma3", "Gemma3ForCausalLM", {**MIXED_WINDOWS, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    ("phi3", "Phi3ForCausalLM", {"hidden_size": 64, "rope_parameters": PARTIAL}),
    (
        "granite",
        "GraniteForCausalLM",
        {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    ),
    ("smollm3", "SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    ("olmo2", "Olmo2ForCausalLM", {"hidden_size": 64}),
    ("starcoder2", "Starcoder2ForCausalLM", {"hidden_size": 64, "sliding_window": None}),
    ("cohere2", "Cohere2ForCausalLM", {"num_hidden_layers": 4, "sliding_window": 9, "tie_word_embeddings": True}),
    ("glm4", "Glm4ForCausalLM", {"attention_bias": True, "rope_parameters": PARTIAL}),
]
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SANDWICH = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OWN_PARTS = {
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "olmo2": SANDWICH,
    "glm4": PARTS | {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
}
PAIRS = ("llama", "granite", "smollm3")


def converted(name: str, architecture: str, tensor: np.ndarray, config: Any) -> tuple[str, np.ndarray]:
    """A tensor as llama.cpp's conversion names and stores it."""
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{kind}", tensor
    _, _, layer, part = stem.split(".", 3)
    if architecture in PAIRS and part.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
        pairs = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2)
        tensor = np.ascontiguousarray(pairs.reshape(tensor.shape))
    return f"blk.{layer}.{OWN_PARTS.get(architecture, PARTS)[part]}.{kind}", tensor


def write(path: Path, architecture: str, model: PreTrainedModel) -> Path:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ("starcoder2", "cohere2"):
        writer.add_layer_norm_eps(config.norm_epsilon if architecture == "starcoder2" else config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "partial_rotary_factor" in config.rope_parameters:
        writer.add_rope_dimension_count(int(head_dim * config.rope_parameters["partial_rotary_factor"]))
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture == "cohere2":
        writer.add_logit_scale(config.logit_scale)
        writer.add_sliding_window(config.sliding_window)
    if config.rope_parameters.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for name, tensor in checkpoint(model).items():
        writer.add_tensor(*converted(name, architecture, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SERVED = [case for case in CASES if case[1] in SERVED_ARCHITECTURES]


@pytest.mark.parametrize(("name", "architecture", "changes"), SERVED, ids=[case[0] for case in SERVED])
def test_logits_are_those_before_the_conversion(
    name: str, architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    reference = make_reference(architecture, changes)
    path = str(write(tmp_path / "m.gguf", name, reference))
    config = load_hf_config(path)
    with torch.inference_mode():
        want = reference(torch.tensor([TOKENS])).logits[0]
    model = make_decoder(config)
    with torch.no_grad():
        model.load_weights(iterate_weights(path, "gguf", config))
        model.finish()
    torch.testing.assert_close(logits_of(model, TOKENS), want, atol=1e-3, rtol=2e-4)


def test_every_architecture_of_gguf_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize(("layers", "every"), [(26, 6), (18, 6)])
def test_gemma3_has_no_window_in_each_sixth_layer_unless_the_file_says_otherwise(
    layers: int, every: int, tmp_path: Path
) -> None:
    from vllm.transformers_utils.gguf import GGUFFile
    from vllm.transformers_utils.gguf_config import gguf_config

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(9)
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    kinds = gguf_config(GGUFFile(tmp_path / "m.gguf"))["layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == list(range(every - 1, layers, every))


LIGHTHOUSE = (
    "The history of the lighthouse is long. In ancient times, sailors depended on fires that were lit on hilltops. "
    "Later, towers of stone were built at the entrances of harbours, and keepers tended their lamps each night. "
) * 14 + "The capital of France is"


@pytest.mark.nightly
def test_gemma3_270m_continues_a_text_as_transformers_does_from_the_same_file() -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from vllm import LLM, SamplingParams
    from vllm.transformers_utils.config import hf_config_of
    from vllm.transformers_utils.packaged_models import ensure_packaged_model
    from vllm.transformers_utils.tokenizer import load_tokenizer

    path = str(ensure_packaged_model("gemma3-270m"))
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(LIGHTHOUSE)
    pinned = ids[: len(ids) - 40]
    assert len(pinned) > 512  # longer than the window

    sketch = AutoModelForCausalLM.from_config(hf_config_of(load_hf_config(path).to_dict()), dtype=torch.float32)
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=sketch)
    config = hf_config_of(read["config"] | {"architectures": ["Gemma3ForCausalLM"]})
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {name: torch.as_tensor(tensor) for name, tensor in read["tensors"].items()}
    assert reference.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]
    reference.tie_weights()
    out = reference.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    want = out[0, len(ids) :].tolist()
    assert "Paris" in tokenizer.decode(want)
    del sketch, reference, read, tensors

    llm = LLM(path, dtype="float32", max_model_len=2048, max_num_seqs=4, kv_cache_memory_bytes=1 << 28)
    llm.add_system_prompt(pinned)
    for _ in range(2):
        found = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=16))[0]
        assert found.num_cached_tokens >= len(pinned)
        assert list(found.outputs[0].token_ids)[: len(want)] == want
