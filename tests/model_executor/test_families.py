"""Every family against transformers: logits of random checkpoints in float32, from the tensors that it would save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tests.model_executor.networks import logits_of, logits_of_compiled_steps, make_decoder
from vllm.attention.backends import get_backend
from vllm.exceptions import StartupError
from vllm.model_executor.models.registry import decoder_spec
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.transformers_utils.architectures import ARCHITECTURES
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
]
IDS = [f"{architecture.removesuffix('ForCausalLM')} {changes}" for architecture, changes in CASES]
TOKENS = [(7 * i * i + 3) % 50 for i in range(37)]


def make_reference(architecture: str, changes: dict[str, Any]) -> PreTrainedModel:
    """transformers' network, every weight random, norms and biases included."""
    model_class = getattr(transformers, architecture)
    values = COMMON | {"model_type": ARCHITECTURES[architecture], "architectures": [architecture]} | changes
    config = model_class.config_class.from_dict(values)
    config._attn_implementation = "eager"  # the only one that caps scores
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model


def checkpoint(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def config_of(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration as it is read back from its config.json."""
    return hf_config_of(model.config.to_dict())


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
    assert (model.program is not None, model.head.packed is not None) == (packed, packed)
    backend = get_backend("CPU" if packed else "TORCH", model.attention_specs, 16, torch.device("cpu"))
    # Logits of the first tokens are those of a prompt shorter than a window, for later ones do not change them. Pinned
    # prompts are shorter and longer than the windows of these cases, and so are chunks.
    for pinned, chunk in ((0, None), (3, 17), (20, 6)):
        found = logits_of(model, TOKENS, backend, block=16, pinned=pinned, chunk=chunk)
        torch.testing.assert_close(found, want, atol=1e-3, rtol=2e-4)
    if packed:
        found = logits_of_compiled_steps(model, TOKENS, pinned=20)
        torch.testing.assert_close(found, want[20:], atol=1e-3, rtol=2e-4)


def test_every_family_has_a_case() -> None:
    assert {architecture for architecture, _ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("LlamaForCausalLM", {"hidden_act": "tanh"}, "hidden_act 'tanh'; supported: silu"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention", "linear_attention", "x"]}, "layer_types 'linear_atten"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0; supported: None"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ],
)
def test_values_that_are_not_understood_are_refused(architecture: str, changes: dict[str, Any], why: str) -> None:
    values = COMMON | {"model_type": ARCHITECTURES[architecture], "architectures": [architecture]}
    config = hf_config_of(values)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(StartupError, match=why) as error:
        decoder_spec(config, 64)
    assert f"model type '{ARCHITECTURES[architecture]}'" in str(error.value)
    assert ", ".join(ARCHITECTURES) in str(error.value)


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
