"""Every family against transformers: logits of random checkpoints in float32, from the tensors that it would save."""

from __future__ import annotations

import copy
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from tests.model_executor.networks import logits_of, logits_of_compiled_steps, make_decoder
from vllm.attention.backends import get_backend
from vllm.distributed.parallel_state import join_ranks
from vllm.exceptions import StartupError
from vllm.model_executor.layers.moe import StackedExperts
from vllm.model_executor.models.registry import decoder_spec
from vllm.model_executor.models.spec import MoE
from vllm.ops import mxfp4
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.transformers_utils.architectures import ARCHITECTURES, TEXT_PARTS
from vllm.transformers_utils.config import hf_config_of

COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MIXED_WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 9}
LONG = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]}
GREW = {"original_max_position_embeddings": 16}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5} | {
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
DENSE = {
    "num_local_experts": 0,
    "mamba_n_heads": 8,
    "layer_types": ["full_attention"] * 3,
    "shared_intermediate_size": 80,
}
GROWING = {"type": "yarn", "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 0.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
MIXED_HEADS = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 9,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
}
QWEN_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True}
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 3}
GLM_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 1,
}
GEMMA_EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 16}
LONG_PHI = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    # transformers turns by the short ones whatever the length, and Microsoft's own code does not.
    "short_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0],
    "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 16,
}
# Architecture, and what makes a case of its own.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 7}),
    ("Qwen2ForCausalLM", {"hidden_size": 64}),
    ("Qwen2ForCausalLM", {"hidden_size": 64, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("Qwen3ForCausalLM", {}),
    ("Qwen3ForCausalLM", {"rope_parameters": YARN, "attention_bias": True}),
    ("Gemma3ForCausalLM", MIXED_WINDOWS),
    ("Gemma3ForCausalLM", {**MIXED_WINDOWS, "tie_word_embeddings": True, "final_logit_softcapping": 3.0}),
    ("Gemma3ForCausalLM", {**MIXED_WINDOWS, "query_pre_attn_scalar": 40, "attention_bias": True}),
    ("Gemma2ForCausalLM", {**MIXED_WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 40}),
    ("Gemma2ForCausalLM", {"sliding_window": 64, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("Phi3ForCausalLM", {"hidden_size": 64, "sliding_window": 6}),
    ("Phi3ForCausalLM", {"hidden_size": 64, "partial_rotary_factor": 0.75, "rope_scaling": LONG, **GREW}),
    ("GraniteForCausalLM", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    ("GraniteMoeHybridForCausalLM", {**MULTIPLIERS, **DENSE, "position_embedding_type": "rope"}),
    ("GraniteMoeHybridForCausalLM", {**DENSE, "tie_word_embeddings": True}),
    ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 8}),
    ("Olmo2ForCausalLM", {}),
    ("Olmo3ForCausalLM", {**MIXED_WINDOWS, "rope_scaling": {**YARN, "attention_factor": 1.2}, "rope_theta": 500.0}),
    ("CohereForCausalLM", {"hidden_size": 64, "tie_word_embeddings": True}),
    ("CohereForCausalLM", {"use_qk_norm": True, "logit_scale": 0.5, "attention_bias": True}),
    ("Cohere2ForCausalLM", {"hidden_size": 64, "sliding_window": 5, "sliding_window_pattern": 3}),
    ("Starcoder2ForCausalLM", {"sliding_window": 8, "tie_word_embeddings": True}),
    ("Starcoder2ForCausalLM", {"use_bias": False}),
    ("GlmForCausalLM", {}),
    ("GlmForCausalLM", {"attention_bias": False, "partial_rotary_factor": 1.0}),
    ("Glm4ForCausalLM", {}),
    ("Exaone4ForCausalLM", {**MIXED_WINDOWS}),
    ("Exaone4ForCausalLM", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    ("SeedOssForCausalLM", {}),
    ("SeedOssForCausalLM", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("InternLM3ForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}),
    ("InternLM3ForCausalLM", {"qkv_bias": True, "bias": True}),
    ("Ministral3ForCausalLM", {"rope_parameters": {**YARN, **GROWING}, "sliding_window": 9}),
    ("Gemma4ForCausalLM", {**MIXED_HEADS, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("Gemma4ForCausalLM", {**MIXED_HEADS, "final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    ("Gemma4ForCausalLM", {**MIXED_HEADS, **GEMMA_EXPERTS, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("MixtralForCausalLM", {**LOCAL_EXPERTS, "sliding_window": 7}),
    ("Qwen2MoeForCausalLM", {**QWEN_EXPERTS, "shared_expert_intermediate_size": 32, "norm_topk_prob": False}),
    ("Qwen2MoeForCausalLM", {**QWEN_EXPERTS, "shared_expert_intermediate_size": 32, "qkv_bias": False}),
    ("Qwen3MoeForCausalLM", QWEN_EXPERTS),
    ("Qwen3MoeForCausalLM", {**QWEN_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1], "attention_bias": True}),
    ("Qwen3MoeForCausalLM", {**QWEN_EXPERTS, "decoder_sparse_step": 2}),
    ("GptOssForCausalLM", {**LOCAL_EXPERTS, **MIXED_WINDOWS, "rope_parameters": YARN}),
    ("GptOssForCausalLM", {**LOCAL_EXPERTS, **MIXED_WINDOWS, "swiglu_limit": 0.5, "attention_bias": False}),
    ("GraniteMoeForCausalLM", {**LOCAL_EXPERTS, **MULTIPLIERS, "attention_bias": True}),
    ("GraniteMoeSharedForCausalLM", {**LOCAL_EXPERTS, **MULTIPLIERS, "shared_intermediate_size": 32}),
    ("GraniteMoeSharedForCausalLM", {**LOCAL_EXPERTS, "shared_intermediate_size": 0, "tie_word_embeddings": True}),
    ("OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8}),
    ("OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "norm_topk_prob": True}),
    ("Glm4MoeForCausalLM", {**GLM_EXPERTS, "n_group": 4, "topk_group": 2, "use_qk_norm": True}),
    ("Glm4MoeForCausalLM", {**GLM_EXPERTS, "n_shared_experts": 2, "norm_topk_prob": False, "attention_bias": True}),
    ("MiniMaxM2ForCausalLM", {**LOCAL_EXPERTS, "rotary_dim": 8}),
    ("PhimoeForCausalLM", {"num_local_experts": 8, "attention_bias": True, "lm_head_bias": True}),
    ("PhiMoEForCausalLM", {"num_local_experts": 8, "rope_parameters": LONG_PHI, "router_jitter_noise": 0.4}),
]
IDS = [f"{architecture.removesuffix('ForCausalLM')} {changes}" for architecture, changes in CASES]
TOKENS = [(7 * i * i + 3) % 50 for i in range(37)]


def make_reference(architecture: str, changes: dict[str, Any]) -> PreTrainedModel:
    """transformers' network, every weight random, norms and biases included."""
    values = (
        COMMON | {"model_type": ARCHITECTURES[architecture], "architectures": [architecture]} | copy.deepcopy(changes)
    )
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config._attn_implementation = "eager"  # the only one that caps scores
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("layer_scalar", "e_score_correction_bias")):
                torch.nn.init.normal_(buffer, 0.5, 0.3)
    return model


def checkpoint(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def config_of(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration as the engine's processes hand it on."""
    return hf_config_of(json.loads(model.config.to_json_string()))


@pytest.mark.parametrize(("architecture", "changes"), CASES, ids=IDS)
@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_those_of_transformers(architecture: str, changes: dict[str, Any], packed: bool) -> None:
    if packed and cpu_kernels.library() is None:
        pytest.skip("the compiled CPU kernels are not there")
    reference = make_reference(architecture, changes)
    with torch.inference_mode():
        want = reference(torch.tensor([TOKENS])).logits[0]
    model = make_decoder(config_of(reference), packed=packed)
    with torch.no_grad():
        model.load_weights(checkpoint(reference).items())
        model.finish()
    has_experts = any(isinstance(layer.ffn, MoE) for layer in model.spec.layers)
    assert (model.program is not None, model.head.packed is not None) == (packed and not has_experts, packed)
    backend = get_backend("CPU" if packed else "TORCH", model.attention_specs, 16, torch.device("cpu"))
    # Logits of the first tokens are those of a prompt shorter than a window, for later ones do not change them. Pinned
    # prompts are shorter and longer than the windows of these cases, and so are chunks.
    for pinned, chunk in ((0, None), (3, 17), (20, 6)):
        found = logits_of(model, TOKENS, backend, block=16, pinned=pinned, chunk=chunk)
        torch.testing.assert_close(found, want, atol=1e-3, rtol=2e-4)
    if model.program is not None:
        found = logits_of_compiled_steps(model, TOKENS, pinned=20)
        torch.testing.assert_close(found, want[20:], atol=1e-3, rtol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("architecture", "changes"), CASES, ids=IDS)
def test_logits_on_a_gpu(architecture: str, changes: dict[str, Any]) -> None:
    reference = make_reference(architecture, changes)
    with torch.inference_mode():
        want = reference(torch.tensor([TOKENS])).logits[0]
    with torch.device("cuda"):
        model = make_decoder(config_of(reference)).to("cuda")
    with torch.no_grad():
        model.load_weights(checkpoint(reference).items())
        model.finish()
    backend = get_backend("TRITON", model.attention_specs, 16, torch.device("cuda"))
    for pinned, chunk in ((0, None), (3, 17), (20, 6)):
        found = logits_of(model, TOKENS, backend, block=16, pinned=pinned, chunk=chunk, device="cuda")
        torch.testing.assert_close(found.cpu(), want, atol=1e-3, rtol=2e-4)


def logits_on_rank(rank: int, folder: str, results: Any) -> None:
    """Puts the index of each case and its logits."""
    group = join_ranks("cpu", rank, 2, Path(folder))
    torch.set_num_threads(1)
    for i, (architecture, changes) in enumerate(CASES):
        reference = make_reference(architecture, changes)
        model = make_decoder(config_of(reference), tp=group)
        with torch.no_grad():
            model.load_weights(checkpoint(reference).items())
            model.finish()
        found = logits_of(model, TOKENS, pinned=20, chunk=6).numpy()
        if rank == 0:
            results.put((i, found))


@pytest.mark.nightly
def test_two_ranks_have_the_same_logits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=logits_on_rank, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get() for _ in CASES)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    for i, (architecture, changes) in enumerate(CASES):
        with torch.inference_mode():
            want = make_reference(architecture, changes)(torch.tensor([TOKENS])).logits[0]
        torch.testing.assert_close(torch.from_numpy(found[i]), want, atol=1e-3, rtol=2e-4)


def test_sequences_within_the_trained_length_are_turned_by_the_short_frequencies() -> None:
    changes = {"hidden_size": 64, "partial_rotary_factor": 0.75, "rope_scaling": LONG, **GREW}
    reference, prompt = make_reference("Phi3ForCausalLM", changes), TOKENS[:16]
    with torch.inference_mode():
        want = reference(torch.tensor([prompt])).logits[0]
    model = make_decoder(config_of(reference), max_positions=16)
    with torch.no_grad():
        model.load_weights(checkpoint(reference).items())
        model.finish()
    torch.testing.assert_close(logits_of(model, prompt), want, atol=1e-3, rtol=2e-4)
    longer = make_decoder(config_of(reference), max_positions=17)
    assert longer.spec.layers[0].mixer.rope != model.spec.layers[0].mixer.rope


@pytest.mark.parametrize(
    ("architecture", "changes", "spellings"),
    [
        ("MixtralForCausalLM", LOCAL_EXPERTS, {"mlp": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"}),
        ("Qwen3MoeForCausalLM", QWEN_EXPERTS, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
        (
            "PhimoeForCausalLM",
            {"num_local_experts": 8},
            {"mlp.router": "mlp.gate", "mlp": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"},
        ),
        (
            "MiniMaxM2ForCausalLM",
            {**LOCAL_EXPERTS, "rotary_dim": 8},
            {"mlp": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"},
        ),
    ],
)
def test_a_tensor_for_each_expert(architecture: str, changes: dict[str, Any], spellings: dict[str, str]) -> None:
    reference = make_reference(architecture, changes)
    whole = checkpoint(reference)
    pieces: dict[str, torch.Tensor] = {}
    for name, tensor in whole.items():
        stem, _, last = name.rpartition(".")
        for old, new in spellings.items():
            if old.startswith("mlp"):
                name, stem = name.replace(f".{old}.", f".{new}."), stem.replace(f".{old}.", f".{new}.")
        if last not in ("gate_up_proj", "down_proj") or not stem.endswith(".experts"):
            pieces[name] = tensor
            continue
        parts = ("gate", "up") if last == "gate_up_proj" else ("down",)
        for part, rows in zip(parts, tensor.chunk(len(parts), dim=1), strict=True):
            pieces |= {f"{stem}.{i}.{spellings[part]}.weight": expert for i, expert in enumerate(rows)}
    assert len(pieces) > len(whole)
    models = [make_decoder(config_of(reference)) for _ in range(2)]
    with torch.no_grad():
        for model, tensors in zip(models, (whole, pieces), strict=True):
            model.load_weights(tensors.items())
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other), name
    lost = next(name for name in pieces if ".experts.5." in name)
    del pieces[lost]
    with torch.no_grad(), pytest.raises(StartupError, match=r"lacks 1 tensors, among them model.layers.0.*experts"):
        make_decoder(config_of(reference)).load_weights(pieces.items())


def test_experts_in_mxfp4() -> None:
    reference = make_reference("GptOssForCausalLM", {**LOCAL_EXPERTS, **MIXED_WINDOWS, "intermediate_size": 64})
    tensors = checkpoint(reference)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = mxfp4.quantise(tensors.pop(name).transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            rounded = mxfp4.dequantise(blocks, scales, torch.float32).transpose(1, 2)
            reference.get_parameter(name).copy_(rounded)
    with torch.inference_mode():
        want = reference(torch.tensor([TOKENS])).logits[0]
    config = config_of(reference)
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    model = make_decoder(config)
    experts = next(module for module in model.modules() if isinstance(module, StackedExperts))
    more, before = experts.bytes_of_unpacking(torch.device("cpu")), sum(p.nbytes for p in experts.parameters())
    with torch.no_grad():
        model.load_weights(tensors.items())
        model.finish()
    weights = experts.weights
    assert weights is not None and weights.gate_up_bias is not None and weights.down_bias is not None
    assert before + more == sum(part.nbytes for part in weights if isinstance(part, torch.Tensor))
    torch.testing.assert_close(logits_of(model, TOKENS), want, atol=1e-3, rtol=2e-4)


def test_every_family_has_a_case() -> None:
    text_parts = {name for name, model_type in ARCHITECTURES.items() if model_type in TEXT_PARTS}
    assert {architecture for architecture, _ in CASES} == set(ARCHITECTURES) - text_parts


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("LlamaForCausalLM", {"hidden_act": "tanh"}, "hidden_act 'tanh'; supported: silu"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention", "linear_attention", "x"]}, "layer_types 'linear_atten"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0; supported: None"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("Starcoder2ForCausalLM", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'; supported: silu"),
        ("Starcoder2ForCausalLM", {"norm_type": "rms_norm"}, "norm_type 'rms_norm'; supported: 'layer_norm'"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "'spiral'; supported: def",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {**YARN, "mrope_section": [2]}},
            "RoPE parameters mrope_section; supp",
        ),
        ("MistralForCausalLM", {"rope_parameters": {**YARN, **GROWING}}, "RoPE parameters llama_4_scaling_beta; supp"),
        (
            "InternLM3ForCausalLM",
            {"rope_parameters": DYNAMIC},
            "'dynamic' beyond 32 tokens; supported: --max-model-len",
        ),
        ("Olmo2ForCausalLM", {"clip_qkv": 8.0}, "clip_qkv 8.0; supported: None"),
        ("Cohere2ForCausalLM", {"use_parallel_block": False}, "use_parallel_block False; supported: True"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\]; supported: 1 \(turned\) or 0"),
        ("Gemma4ForCausalLM", {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input 256; supported: 0"),
        (
            "Gemma4ForCausalLM",
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention 'all'; supported: N",
        ),
    ],
)
def test_values_that_are_not_understood_are_refused(architecture: str, changes: dict[str, Any], why: str) -> None:
    values = COMMON | {"model_type": ARCHITECTURES[architecture], "architectures": [architecture]}
    config = hf_config_of(values | (MIXED_HEADS if architecture == "Gemma4ForCausalLM" else {}))
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(StartupError, match=why) as error:
        decoder_spec(config, 64)
    assert f"model type '{ARCHITECTURES[architecture]}'" in str(error.value)
    assert "docs/models.md" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_local_experts": 8}, "num_local_experts 8; supported: 0"),
        ({"layer_types": ["mamba", "attention", "mamba"]}, "layer_types 'linear_attention'; supported: full_attention"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'; supported: 'rope'"),
    ],
)
def test_granite_4_is_served_where_it_is_dense(changes: dict[str, Any], why: str) -> None:
    names = {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]}
    with pytest.raises(StartupError, match=why):
        decoder_spec(hf_config_of(COMMON | names | DENSE | changes), 64)


@pytest.mark.parametrize(
    ("architecture", "older", "newer"),
    [
        (
            "LlamaForCausalLM",
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "dtype": "bfloat16"},
        ),
        (
            "GlmForCausalLM",
            {"rope_theta": 500.0, "partial_rotary_factor": 0.25},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_theta": 500.0, "rope_local_base_freq": 90.0, "sliding_window_pattern": 2, "sliding_window": 9}
            | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            MIXED_WINDOWS
            | {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
                }
            },
        ),
    ],
)
def test_configurations_of_older_checkpoints(architecture: str, older: dict[str, Any], newer: dict[str, Any]) -> None:
    values = COMMON | {"model_type": ARCHITECTURES[architecture], "architectures": [architecture]}
    configs = [hf_config_of(values | copy.deepcopy(changes)) for changes in (older, newer)]
    assert decoder_spec(configs[0], 64) == decoder_spec(configs[1], 64) != decoder_spec(hf_config_of(values), 64)
    assert configs[0].dtype == configs[1].dtype


def test_an_architecture_that_is_not_supported() -> None:
    config = hf_config_of(COMMON | {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    with pytest.raises(StartupError, match=r"LlamaForSequenceClassification \(model type 'llama'\) is not supported"):
        decoder_spec(config, 64)


def test_layers_of_one_kind_are_tried_once() -> None:
    reference = make_reference("Gemma3ForCausalLM", MIXED_WINDOWS)
    model = make_decoder(config_of(reference))
    assert model.layer_kinds() == [0, 1] and len(model.attention_specs) == 2
    with model.only_layers(model.layer_kinds()):
        assert len(model.layers) == 2
    assert len(model.layers) == 3
