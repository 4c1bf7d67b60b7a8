"""Networks of transformers around our attention: logits are those of transformers alone, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.attention.layer import ForwardContext
from vllm.exceptions import StartupError
from vllm.model_executor.models.transformers_fallback import TransformersModel
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup

BLOCK, PINNED = 4, 21
TOKENS = [(7 * i * i + 3) % 50 for i in range(37)]
COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 9}
BY_DEFAULT = ("gpt_neox", "vaultgemma")
CASES: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "vaultgemma": {**GROUPED, **WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "apertus": GROUPED,
    "arcee": GROUPED,
    "bitnet": GROUPED,
    "ernie4_5": {**GROUPED, "head_dim": 8},
    "gpt2": {},
    "gpt_bigcode": {},
    "helium": {**GROUPED, "head_dim": 8},
    "hunyuan_v1_dense": {**GROUPED, "head_dim": 8},
    "jais2": GROUPED,
    "mixtral": {**GROUPED, **EXPERTS, "sliding_window": 9},
    "nanochat": GROUPED,
    "nemotron": GROUPED,
    "olmo": GROUPED,
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": GROUPED,
    "seed_oss": {**GROUPED, "head_dim": 8},
    "stablelm": GROUPED,
}


def make_reference(model_type: str, changes: dict[str, Any]) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type].from_dict(COMMON | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
    model.config.architectures = [type(model).__name__]
    return model


def checkpoint(model: PreTrainedModel, folder: Any) -> dict[str, torch.Tensor]:
    """The tensors as transformers saves them."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


class Pass:
    """Steps over a KV cache: a pinned prompt in the first slots, then the own blocks of one request."""

    def __init__(self, model: TransformersModel) -> None:
        self.model = model
        self.backend = TorchAttentionBackend()
        rows = [(cache.k, cache.v) for cache in model.caches()]
        self.k = [torch.zeros(64, k.num_heads, k.dim) for k, _ in rows]
        self.v = [torch.zeros(64, v.num_heads, v.dim) for _, v in rows]

    def step(self, blocks: list[int], start: int, tokens: list[int], prefix: int = 0, last: bool = False) -> Any:
        """Logits of tokens from position `start` on, or of the last one, of a request that reads a pinned prefix."""
        positions = torch.arange(start, start + len(tokens))
        own = positions - prefix
        slots = torch.tensor(blocks)[own // BLOCK] * BLOCK + own % BLOCK
        groups = [PrefixGroup(0, len(tokens), 0, prefix)] if prefix else []
        context_len = start + len(tokens) - prefix
        metadata = AttentionMetadata(slots, torch.tensor([blocks]), [len(tokens)], [context_len], groups, BLOCK)
        context = ForwardContext(
            backend=self.backend,
            prepared=self.backend.prepare(metadata, self.model.attention_specs),
            positions=positions,
            slot_mapping=slots,
            k_caches=self.k,
            v_caches=self.v,
            wanted=torch.tensor([len(tokens) - 1]) if last else None,
        )
        with torch.inference_mode():
            return self.model.logits(self.model(torch.tensor(tokens), context))


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.nightly) for name in CASES],
)
def test_logits_are_those_of_transformers_in_chunks_behind_a_pinned_prompt(model_type: str, tmp_path: Any) -> None:
    reference = make_reference(model_type, CASES[model_type])
    with torch.inference_mode():
        want = reference(torch.tensor([TOKENS])).logits[0]
    model = TransformersModel(reference.config, torch.float32)
    with torch.no_grad():
        model.load_weights(checkpoint(reference, tmp_path).items())
    run = Pass(model)
    pinned = list(range(-(-PINNED // BLOCK)))
    found = [run.step(pinned, 0, TOKENS[:8]), run.step(pinned, 8, TOKENS[8:PINNED])]
    own = [11, 9, 14, 8, 10]
    found += [run.step(own, PINNED, TOKENS[PINNED:30], PINNED), run.step(own, 30, TOKENS[30:36], PINNED)]
    found.append(run.step(own, 36, TOKENS[36:], PINNED, last=True))
    torch.testing.assert_close(torch.cat(found), want, atol=1e-3, rtol=2e-4)


def test_windows_and_caps_are_those_that_the_code_asks_for() -> None:
    model = TransformersModel(make_reference("vaultgemma", CASES["vaultgemma"]).config, torch.float32)
    assert [spec.window for spec in model.layers] == [9, None, 9]
    assert {spec.softcap for spec in model.layers} == {2.0}
    assert len(model.attention_specs) == 2


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("bloom", {"n_head": 4}, "ALiBi"),
        ("mamba", {}, "MambaForCausalLM.*layers of type 'linear_attention'"),
        ("falcon_h1", {}, "layers of type 'hybrid'"),
        ("diffllama", GROUPED, "attention of layer 1 is no plain self-attention"),
        ("xglm", {"d_model": 32, "attention_heads": 4, "num_layers": 3, "ffn_dim": 48}, "asks for attention 0 times"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
    ],
)
def test_what_cannot_work_is_refused_by_name(model_type: str, changes: dict[str, Any], why: str) -> None:
    config = CONFIG_MAPPING[model_type].from_dict(COMMON | changes)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    with pytest.raises(StartupError, match=why) as error:
        TransformersModel(config, torch.float32)
    assert repr(model_type) in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_that_is_missing_or_unknown_is_named(tmp_path: Any) -> None:
    reference = make_reference("gpt_neox", {})
    tensors = checkpoint(reference, tmp_path)
    for change, why in (
        ({"gpt_neox.extra.weight": torch.zeros(3)}, r"unknown 1 tensors, among them gpt_neox\.extra\.weight"),
        ({"gpt_neox.layers.0.mlp.dense_h_to_4h.weight": None}, r"lacks 1 tensors, among them .*dense_h_to_4h"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        with pytest.raises(StartupError, match=why):
            TransformersModel(reference.config, torch.float32).load_weights(changed.items())
