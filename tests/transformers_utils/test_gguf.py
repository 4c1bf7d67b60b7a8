from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, weights, write_gguf
from transformers import LlamaConfig

from vllm.exceptions import StartupError
from vllm.model_executor.model_loader.gguf_weights import gguf_weights
from vllm.transformers_utils.config import hf_config_of
from vllm.transformers_utils.gguf import GGUFFile
from vllm.transformers_utils.gguf_config import gguf_config


def read(path: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    file = GGUFFile(path)
    config = hf_config_of(gguf_config(file))
    return config, dict(gguf_weights(file, config))


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Orders rows as the conversion from Hugging Face to GGUF does."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def test_configuration_follows_the_metadata(small_gguf: Path) -> None:
    config = hf_config_of(gguf_config(GGUFFile(small_gguf)))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (HIDDEN, LAYERS, VOCAB)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, 16)
    assert config.max_position_embeddings == 512
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.architectures == ["LlamaForCausalLM"]


def test_weights_come_back_as_they_were_before_conversion(tmp_path: Path) -> None:
    original = weights(tied=False)
    stored = {
        name: interleave(w, HEADS if "attn_q" in name else KV_HEADS) if "attn_q" in name or "attn_k" in name else w
        for name, w in original.items()
    }
    config, loaded = read(write_gguf(tmp_path / "m.gguf", stored))
    assert not config.tie_word_embeddings
    assert len(loaded) == len(original)
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
        "blk.1.attn_k": "model.layers.1.self_attn.k_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    }.items():
        torch.testing.assert_close(loaded[f"{ours}.weight"], torch.from_numpy(original[f"{theirs}.weight"]))


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
def test_quantised_weights_are_near_the_originals(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    _, loaded = read(write_gguf(tmp_path / "m.gguf", quantise=kind))
    original = torch.from_numpy(weights()["blk.0.ffn_up.weight"])
    found = loaded["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == torch.float32
    assert (found - original).abs().max() < (0.03 if kind == gguf.GGMLQuantizationType.Q8_0 else 0.3)


def test_linear_scaling_of_the_rotary_embedding(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    )
    assert gguf_config(GGUFFile(path))["rope_parameters"]["factor"] == 4.0


def test_llama3_scaling_is_recognised_in_its_divisors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=16, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(8) / 8)
    stored = {**weights(), "rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}
    config, loaded = read(write_gguf(tmp_path / "m.gguf", stored))
    assert config.rope_parameters == scaling
    assert len(loaded) == len(weights())


def test_unknown_divisors_of_the_rotary_embedding_are_refused(tmp_path: Path) -> None:
    stored = {**weights(), "rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    with pytest.raises(StartupError, match="rotary"):
        read(write_gguf(tmp_path / "m.gguf", stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "'longrope'"),
        ({"extra": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"extra": {"llama.rope.dimension_count": 8}}, "part of each head"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        read(write_gguf(tmp_path / "m.gguf", **change))


def test_a_missing_or_unknown_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    without = {name: w for name, w in weights().items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(StartupError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        read(write_gguf(tmp_path / "a.gguf", without))
    with pytest.raises(StartupError, match=r"blk\.0\.attn_q\.bias"):
        read(write_gguf(tmp_path / "b.gguf", {**weights(), "blk.0.attn_q.bias": np.zeros(HIDDEN, np.float32)}))
    with pytest.raises(StartupError, match="shape"):
        read(write_gguf(tmp_path / "c.gguf", {**weights(), "blk.0.attn_q.weight": np.zeros((8, HIDDEN), np.float32)}))


@pytest.mark.parametrize("kept", [0, 3, 10, 23, 500, 5000, 0.5, 0.999])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, small_gguf: Path, kept: float) -> None:
    data = small_gguf.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(data[: int(kept if kept >= 1 or kept == 0 else kept * len(data))])
    with pytest.raises(StartupError, match=str(path)) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_damaged_headers_never_raise_anything_else(tmp_path: Path, small_gguf: Path) -> None:
    data = bytearray(small_gguf.read_bytes())
    rng = np.random.default_rng(1)
    path = tmp_path / "damaged.gguf"
    for _ in range(200):
        changed = bytearray(data)
        for at in rng.integers(4, 6000, size=4):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            GGUFFile(path)
        except StartupError as error:
            assert "\n" not in str(error)


def test_what_is_no_gguf_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(StartupError, match="not a GGUF"):
        GGUFFile(path)
    with pytest.raises(StartupError, match="Cannot open"):
        GGUFFile(tmp_path / "absent.gguf")


def test_default_model_loads_whole(default_model_path: str) -> None:
    config, loaded = read(Path(default_model_path))
    assert len(loaded) == 272
    assert config.max_position_embeddings == 8192
    assert all(bool(w.isfinite().all()) for w in loaded.values())
