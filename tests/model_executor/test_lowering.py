"""Networks as data, lowered to programs of the compiled CPU kernels: the same logits as torch makes of their layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.model_executor.networks import decoder_of, logits_of, logits_of_compiled_steps, make_decoder
from tests.model_executor.test_families import MIXED_WINDOWS, TOKENS, checkpoint, config_of, make_reference
from vllm.attention.backends.cpu import CpuAttentionBackend
from vllm.model_executor.cpu_program import CpuProgram, misfit_of_sizes
from vllm.model_executor.models.decoder import Decoder
from vllm.model_executor.models.spec import (
    MLP,
    AttentionMixer,
    DecoderSpec,
    LayerNorms,
    LayerSpec,
    QueryGrowth,
    RopeSpec,
)
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.norm import Norm

with_kernels = pytest.mark.skipif(cpu_kernels.library() is None, reason="the compiled CPU kernels are not built")
HEAD_DIM = 16


def rope(dim: int, base: float = 100.0, **options: Any) -> RopeSpec:
    return RopeSpec(tuple(base ** -(2 * i / dim) for i in range(dim // 2)), **options)


MIXER = AttentionMixer(4, 2, HEAD_DIM, scale=0.3, rope=rope(HEAD_DIM))
FFN = MLP(48, "silu")
NORMS = LayerNorms(Norm(1e-5))
LAYER = LayerSpec(MIXER, FFN, NORMS)
SPEC = DecoderSpec(vocab_size=50, hidden_size=32, layers=(LAYER,), final_norm=Norm(1e-5), tied=False)
LAYER_NORMS = LayerNorms(Norm(1e-5, kind="layer"), has_bias=True)


def mixer(**changes: Any) -> LayerSpec:
    return dataclasses.replace(LAYER, mixer=dataclasses.replace(MIXER, **changes))


def layer(**changes: Any) -> LayerSpec:
    return dataclasses.replace(LAYER, **changes)


LAYERS = {
    "window": mixer(window=9),
    "capped scores": mixer(softcap=1.5),
    "sinks": mixer(sinks=True),
    "window, cap and sinks": mixer(window=9, softcap=1.5, sinks=True),
    "norm of each head, 1 + w": mixer(qk_norm=Norm(1e-5, offset=1.0)),
    "norm over all heads": mixer(qk_norm=Norm(1e-5), qk_norm_over_all=True),
    "layer norm of each head": mixer(qk_norm=Norm(1e-5, kind="layer")),
    "norm of each head by its own weights": mixer(qk_norm=Norm(1e-5, kind="layer"), qk_norm_of_each=True),
    "norm of values": mixer(v_norm=Norm(1e-5)),
    "queries that grow": mixer(query_growth=QueryGrowth(0.5, 8)),
    "factor of a layer": layer(has_scalar=True),
    "biases of some": layer(
        mixer=dataclasses.replace(MIXER, biases=frozenset("qo")),
        ffn=MLP(48, "silu", biases=frozenset({"up", "down"})),
    ),
    "no positions": mixer(rope=None),
    "positions of a part, with a factor": mixer(rope=rope(8, factor=1.3)),
    "positions of neighbours": mixer(rope=rope(HEAD_DIM, interleaved=True)),
    "layer norms with biases": layer(norms=LAYER_NORMS),
    "norms of 1 + w": layer(norms=LayerNorms(Norm(1e-5, offset=1.0))),
    "norms on both sides": layer(norms=LayerNorms(Norm(1e-5), post_mixer=True, post_ffn=True)),
    "norms behind": layer(norms=LayerNorms(Norm(1e-5), pre_mixer=False, pre_ffn=False, post_mixer=True, post_ffn=True)),
    "side by side": layer(parallel=True, norms=LAYER_NORMS),
    "side by side, scaled": layer(parallel=True, residual_multiplier=0.4),
    "residual multiplier": layer(residual_multiplier=0.4, norms=LayerNorms(Norm(1e-5), post_mixer=True)),
    "GELU by tanh": layer(ffn=MLP(48, "gelu_tanh")),
    "GELU without a gate": layer(ffn=MLP(48, "gelu", gated=False, biases=frozenset({"up", "down"}))),
    "squared ReLU without a gate": layer(ffn=MLP(64, "relu2", gated=False)),
}
SPECS = {name: dataclasses.replace(SPEC, layers=(LAYER, one)) for name, one in LAYERS.items()} | {
    "layers that differ": dataclasses.replace(
        SPEC, layers=tuple(LAYERS.values()), final_norm=LAYER_NORMS.norm, final_norm_bias=True
    ),
    "scaled and capped": dataclasses.replace(
        SPEC, tied=True, embedding_multiplier=5.7, logits_multiplier=0.6, logits_softcap=1.1
    ),
}


def random_weights(model: Decoder) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        weights[name] = 0.6 + 0.3 * values if tensor.dim() == 1 else values * 1.5 / tensor.shape[1] ** 0.5
    return weights


@with_kernels
@pytest.mark.parametrize("name", SPECS)
@torch.inference_mode()
def test_programs_compute_what_torch_does(name: str) -> None:
    spec = SPECS[name]
    plain, packed = decoder_of(spec), decoder_of(spec, packed=True)
    weights = random_weights(plain)
    for model in (plain, packed):
        model.load_state_dict(weights)
        model.finish()
    assert plain.program is None and packed.program is not None
    want = logits_of(plain, TOKENS)
    for pinned, chunk in ((0, None), (5, 4), (20, 6)):
        found = logits_of(packed, TOKENS, CpuAttentionBackend(16), 16, pinned=pinned, chunk=chunk)
        torch.testing.assert_close(found, want, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of_compiled_steps(packed, TOKENS, pinned=20), want[20:], atol=2e-4, rtol=1e-4)


def rounded_to_int8(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric, a factor for each row."""
    factor = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / factor).round() * factor


@with_kernels
@torch.no_grad()
def test_windows_over_int8_weights() -> None:
    reference = make_reference("Gemma3ForCausalLM", MIXED_WINDOWS)
    model = make_decoder(config_of(reference), packed=True, int8=True)
    model.load_weights(checkpoint(reference).items())
    model.finish()
    whole = reference(torch.tensor([TOKENS])).logits[0]
    for module in reference.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(rounded_to_int8(module.weight))
    want = reference(torch.tensor([TOKENS])).logits[0]
    assert (want - whole).abs().max() > 0.05
    found = logits_of(model, TOKENS, CpuAttentionBackend(16), 16, pinned=20, chunk=6)
    torch.testing.assert_close(found, want, atol=2e-3, rtol=2e-4)


@with_kernels
@torch.no_grad()
def test_windows_in_bfloat16() -> None:
    reference = make_reference("Gemma3ForCausalLM", MIXED_WINDOWS).bfloat16().float()
    want = reference(torch.tensor([TOKENS])).logits[0]
    errors = {}
    for packed in (False, True):
        model = make_decoder(config_of(reference), torch.bfloat16, packed=packed)
        model.load_weights(checkpoint(reference).items())
        model.finish()
        backend = CpuAttentionBackend(16) if packed else None
        found = logits_of(model, TOKENS, backend, 16, pinned=20, chunk=6).float()
        errors[packed] = ((found - want).norm() / want.norm()).item()
    # No worse than torch's own layers, which round between their operations; and something is rounded.
    assert 1e-4 < errors[True] <= 1.1 * errors[False] < 0.1


def test_a_program_knows_every_part_of_a_network() -> None:
    """Whoever adds a part to a network must say in `cpu_program` how it is lowered, or that it is a misfit: a part that
    is left out silently makes wrong tokens."""
    known = {
        AttentionMixer: "num_heads num_kv_heads head_dim scale rope window softcap sinks qk_norm qk_norm_over_all "
        "qk_norm_of_each v_norm v_is_k query_growth biases",
        QueryGrowth: "beta length",
        RopeSpec: "frequencies factor interleaved",
        MLP: "size activation gated biases",
        LayerNorms: "norm pre_mixer post_mixer pre_ffn post_ffn has_bias",
        LayerSpec: "mixer ffn norms parallel residual_multiplier has_scalar",
        DecoderSpec: "vocab_size hidden_size layers final_norm tied final_norm_bias embedding_multiplier "
        "logits_multiplier logits_softcap head_bias names",
        Norm: "eps kind offset rounds_first",
    }
    for part, names in known.items():
        assert {field.name for field in dataclasses.fields(part)} == set(names.split()), part.__name__


def test_what_the_kernels_do_not_compute() -> None:
    assert all(CpuProgram.misfit(spec) is None for spec in SPECS.values())
    other: Any = "elu"
    odd = layer(ffn=MLP(48, other))
    assert CpuProgram.misfit(dataclasses.replace(SPEC, layers=(LAYER, odd))) == "its activation is elu"
    odd_sizes = dataclasses.replace(SPEC, layers=(LAYER, layer(ffn=MLP(40, "silu"))))
    assert misfit_of_sizes(odd_sizes, 1, torch.float32) == "intermediate_size 40 is no multiple of 16"
    upside_down = dataclasses.replace(SPEC, logits_multiplier=-1.0)
    assert misfit_of_sizes(upside_down, 1, torch.float32) == "its logits are multiplied by -1"
