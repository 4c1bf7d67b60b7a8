from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from vllm.exceptions import StartupError
from vllm.transformers_utils import config
from vllm.transformers_utils.config import (
    eos_token_ids,
    load_generation_config,
    load_hf_config,
    resolve_model,
    weights_digest,
)
from vllm.transformers_utils.tokenizer import Tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with a configuration and one weight."""
    folder = tmp_path / "checkpoint"
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    return folder


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_model_is_the_default_one(default_model_path: str) -> None:
    assert resolve_model(None) == ("SmolLM2-135M-Instruct", default_model_path)
    assert resolve_model("SmolLM2-135M-Instruct") == ("SmolLM2-135M-Instruct", default_model_path)


def test_directories_and_files_are_themselves(checkpoint: Path, small_gguf: Path) -> None:
    assert resolve_model(str(checkpoint)) == (str(checkpoint), str(checkpoint))
    assert resolve_model(str(small_gguf)) == (str(small_gguf), str(small_gguf))
    assert load_hf_config(str(checkpoint)).hidden_size == 64
    assert load_hf_config(str(small_gguf)).hidden_size == 64


def test_overrides_win_over_what_the_checkpoint_says(checkpoint: Path, small_gguf: Path) -> None:
    overrides = {
        "max_position_embeddings": 99,
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32, "rope_theta": 500.0},
    }
    for path in (checkpoint, small_gguf):
        config = load_hf_config(str(path), overrides)
        assert (config.hidden_size, config.max_position_embeddings) == (64, 99)
        assert config.rope_parameters["rope_theta"] == 500.0
    # As older checkpoints spell it.
    config = load_hf_config(str(checkpoint), {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (config.rope_parameters["rope_theta"], config.rope_parameters["factor"]) == (500.0, 2.0)


@pytest.mark.parametrize(
    "overrides", [{"architectures": ["Qwen2ForCausalLM"]}, {"model_type": "qwen2"}, {"hidden_size": "large"}]
)
def test_overrides_that_cannot_be_are_one_line(checkpoint: Path, overrides: dict[str, object]) -> None:
    with pytest.raises(StartupError, match="--hf-overrides") as caught:
        load_hf_config(str(checkpoint), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"architectures": 5}, "architectures must be a list of strings, got 5."),
        ({"architectures": "LlamaForCausalLM"}, 'architectures must be a list of strings, got "LlamaForCausalLM".'),
        ({"architectures": [["x"]]}, 'architectures must be a list of strings, got [["x"]].'),
        ({"quantization_config": "x"}, 'quantization_config must be an object, got "x".'),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0."),
        ({"num_key_value_heads": -2}, "num_key_value_heads must be at least 1, got -2."),
    ],
)
def test_overrides_of_the_wrong_kind_are_named(checkpoint: Path, overrides: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError, match=re.escape(f"config.json with --hf-overrides: {words}")):
        load_hf_config(str(checkpoint), overrides)


def test_overrides_with_unknown_names_are_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *args: told.append(text % args))
    load_hf_config(str(checkpoint), {"rope_theta": 500.0, "torch_dtype": "float32", "num_key_value_heads": None})
    assert told == []
    load_hf_config(str(checkpoint), {"max_positions": 99, "hidden_size": 64, "hiden_size": 1})
    assert told == ["--hf-overrides holds hiden_size, max_positions, unknown to the configuration of model type llama."]


@pytest.mark.parametrize("model", ["/no/such/model", "./absent", "absent.gguf", "a/b/c"])
def test_a_path_that_does_not_exist(model: str) -> None:
    with pytest.raises(StartupError, match="does not exist"):
        resolve_model(model)


def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("connection refused\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(StartupError, match=r"someone/some-model.*connection refused\. .*HF_TOKEN") as caught:
        resolve_model("someone/some-model")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_fetched_without_files_that_are_not_read(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    import huggingface_hub

    seen = {}

    def download(name: str, **kwargs: object) -> str:
        seen.update(kwargs, name=name)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_model("someone/some-model", "v2", download_dir="/models", token="secret")
    assert found == ("someone/some-model", str(checkpoint))
    assert (seen["name"], seen["revision"], seen["cache_dir"]) == ("someone/some-model", "v2", "/models")
    assert seen["token"] == "secret"
    assert "*.safetensors" in seen["allow_patterns"]
    assert "*.bin" not in seen["allow_patterns"]
    resolve_model("someone/some-model", require_weights=False)
    assert "*.safetensors" not in seen["allow_patterns"]
    assert seen["cache_dir"] is None


def test_directories_that_lack_something(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(StartupError, match=r"no weights.*convert"):
        resolve_model(str(checkpoint))
    assert resolve_model(str(checkpoint), require_weights=False)[1] == str(checkpoint)
    (checkpoint / "config.json").rename(checkpoint / "other.gguf")
    with pytest.raises(StartupError, match=r"no config\.json.*other\.gguf"):
        resolve_model(str(checkpoint))
    with pytest.raises(StartupError, match=r"no \.gguf"):
        resolve_model(str(checkpoint / "pytorch_model.bin"))


def test_other_architectures_are_named(checkpoint: Path) -> None:
    change_config(checkpoint, architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(
        StartupError, match=r"MambaForCausalLM of model type 'mamba'; supported architectures: .*LlamaForC"
    ):
        load_hf_config(str(checkpoint))


def test_unknown_quantisation_is_named(checkpoint: Path) -> None:
    change_config(checkpoint, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(StartupError, match="quantised by 'aqlm'; supported are fp8, awq"):
        load_hf_config(str(checkpoint))


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_configuration_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(StartupError, match=r"config\.json"):
        load_hf_config(str(checkpoint))


def test_code_in_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    (checkpoint / "evil.py").write_text(f"open({str(checkpoint / 'ran')!r}, 'w')")
    change_config(checkpoint, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    load_hf_config(str(checkpoint))
    assert not (checkpoint / "ran").exists()


def test_recommended_sampling_values(checkpoint: Path, small_gguf: Path) -> None:
    assert load_generation_config(str(checkpoint)) == {}
    assert load_generation_config(str(small_gguf)) == {}
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_k": None, "max_new_tokens": 9, "do_sample": True, "x": 1}))
    assert load_generation_config(str(checkpoint)) == {"temperature": 0.6, "max_tokens": 9}
    path.write_text('{"top_p": "high"}')
    with pytest.raises(StartupError, match="'high'"):
        load_generation_config(str(checkpoint))


def test_all_end_tokens_are_found(checkpoint: Path, small_gguf: Path, small_tokenizer: Tokenizer) -> None:
    assert eos_token_ids(str(small_gguf), load_hf_config(str(small_gguf)), small_tokenizer) == (2,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    change_config(checkpoint, eos_token_id=4)
    assert eos_token_ids(str(checkpoint), load_hf_config(str(checkpoint)), small_tokenizer) == (2, 4, 5, 7)


def test_digest_changes_with_the_weights_and_only_then(checkpoint: Path, small_gguf: Path) -> None:
    before = weights_digest(str(checkpoint))
    assert len(before) == 64
    assert before == weights_digest(str(checkpoint))
    (checkpoint / "README.md").write_text("unrelated")
    assert before == weights_digest(str(checkpoint))
    status = (checkpoint / "model.safetensors").stat()
    save_file({"model.norm.weight": torch.zeros(64)}, checkpoint / "model.safetensors")
    os.utime(checkpoint / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = weights_digest(str(checkpoint))
    assert after != before
    change_config(checkpoint, rms_norm_eps=1e-3)
    assert weights_digest(str(checkpoint)) not in (before, after)
    assert weights_digest(str(small_gguf)) != before
