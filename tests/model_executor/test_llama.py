"""The Llama network against transformers, and what is said of checkpoints that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig

from tests.model_executor.networks import logits_of, make_decoder
from vllm.exceptions import StartupError
from vllm.model_executor.cpu_program import misfit_of_sizes
from vllm.model_executor.models.decoder import Decoder
from vllm.model_executor.models.registry import decoder_spec


def make_config(**changes: Any) -> LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(options | changes))


def make_reference(config: LlamaConfig) -> transformers.LlamaForCausalLM:
    """transformers' network, every weight random, norms and biases included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model


def checkpoint(model: transformers.LlamaForCausalLM) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def load(config: LlamaConfig, tensors: dict[str, torch.Tensor]) -> Decoder:
    model = make_decoder(config)
    with torch.no_grad():
        model.load_weights(tensors.items())
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 10},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    reference = make_reference(config)
    token_ids = [(7 * i * i + 3) % 50 for i in range(37)]
    with torch.inference_mode():
        want = reference(torch.tensor([token_ids])).logits[0]
    found = logits_of(load(config, checkpoint(reference)), token_ids)
    torch.testing.assert_close(found, want, atol=2e-4, rtol=1e-4)


def test_every_tensor_of_the_checkpoint_is_used() -> None:
    # Each tensor changed alone must change the logits.
    config = make_config(attention_bias=True, mlp_bias=True, num_hidden_layers=1)
    tensors = checkpoint(make_reference(config))
    token_ids = list(range(20))
    before = logits_of(load(config, tensors), token_ids)
    for name, tensor in tensors.items():
        # A constant added to all scores of a query does not show: the key's bias does nothing unless positions turn it.
        changed = logits_of(load(config, tensors | {name: tensor * 1.5 + 0.1}), token_ids)
        assert not torch.allclose(before, changed, atol=1e-4), name


def test_missing_tensor() -> None:
    config = make_config()
    tensors = checkpoint(make_reference(config))
    for name in ("lm_head.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.2.input_layernorm.weight"):
        with pytest.raises(StartupError, match=rf"The checkpoint lacks 1 tensors, among them {name}\."):
            load(config, {n: t for n, t in tensors.items() if n != name})


def test_unknown_tensor() -> None:
    config = make_config()
    tensors = checkpoint(make_reference(config))
    for name in ("model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "vision.weight"):
        with pytest.raises(StartupError, match=f"has a tensor '{name}' that this architecture does not know"):
            load(config, tensors | {name: torch.zeros(2)})


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("longer", [False, True])
def test_wrong_shape(dim: int, longer: bool) -> None:
    config = make_config(attention_bias=True)
    tensors = checkpoint(make_reference(config))
    names = ["self_attn.k_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.q_proj.bias"]
    names = [f"model.layers.0.{name}" for name in names] + ["model.embed_tokens.weight", "model.norm.weight"]
    for name in names:
        tensor = tensors[name]
        if dim >= tensor.dim():
            continue
        size = tensor.shape[dim]
        wrong = torch.cat([tensor, tensor], dim).narrow(dim, 0, size + 1 if longer else size - 1)
        with pytest.raises(StartupError, match=f"The checkpoint's {name} does not fit its configuration: .*has"):
            load(config, tensors | {name: wrong})


def test_another_activation() -> None:
    with pytest.raises(StartupError, match="hidden_act 'elu'; supported: silu"):
        load(make_config(hidden_act="elu"), {})


def test_sizes_that_cannot_be_packed() -> None:
    spec = decoder_spec(make_config(hidden_size=24), 64)
    assert misfit_of_sizes(spec, 1, torch.float32) == "hidden_size 24 is no multiple of 16"
