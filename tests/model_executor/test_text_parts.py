"""Checkpoints that also read images: their language model, from the files that transformers saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from tests.model_executor.networks import logits_of, make_decoder
from tests.model_executor.test_families import COMMON, MIXED_HEADS, MIXED_WINDOWS, TOKENS, YARN
from vllm.exceptions import StartupError
from vllm.model_executor.model_loader import iterate_weights
from vllm.transformers_utils.architectures import ARCHITECTURES, TEXT_PARTS
from vllm.transformers_utils.config import hf_config_of, load_hf_config

TEXT = {name: value for name, value in COMMON.items() if name != "tie_word_embeddings"} | {"pad_token_id": 0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 8,
    "patch_size": 4,
}
# Architecture, its language model, the rest of its configuration.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("Mistral3ForConditionalGeneration", {"model_type": "mistral", "sliding_window": None}, {}),
    "ministral3": (
        "Mistral3ForConditionalGeneration",
        {"model_type": "ministral3", "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
        {"tie_word_embeddings": True},
    ),
    "gemma3": ("Gemma3ForConditionalGeneration", {"model_type": "gemma3_text", **MIXED_WINDOWS}, {}),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {"model_type": "gemma4_text", **MIXED_HEADS, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {},
    ),
}


def make_reference(case: str, text_changes: dict[str, Any] | None = None, **more: Any) -> PreTrainedModel:
    architecture, text, rest = CASES[case]
    whole = {
        "text_config": TEXT | text | (text_changes or {}),
        "vision_config": dict(VISION),
        "image_token_id": 49,
        "image_token_index": 49,
    }
    config = CONFIG_MAPPING[ARCHITECTURES[architecture]].from_dict(
        whole | {"model_type": ARCHITECTURES[architecture], "architectures": [architecture]} | rest | more
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    reference, folder = make_reference(request.param), tmp_path_factory.mktemp("checkpoint")
    reference.save_pretrained(folder)
    return reference, folder


def logits(folder: Path, overrides: dict[str, Any] | None = None) -> torch.Tensor:
    config = load_hf_config(str(folder), overrides)
    model = make_decoder(hf_config_of(json.loads(config.to_json_string())))
    with torch.no_grad():
        model.load_weights(iterate_weights(str(folder), "safetensors", config))
        model.finish()
    return logits_of(model, TOKENS)


def test_logits_are_those_of_transformers(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    reference, folder = saved
    with torch.inference_mode():
        want = reference(input_ids=torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(folder), want, atol=1e-3, rtol=2e-4)
    # Also from tensors by their newer names.
    shutil.copy(folder / "config.json", tmp_path)
    newer = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    assert newer.keys() != load_file(folder / "model.safetensors").keys()
    save_file(newer, tmp_path / "model.safetensors")
    torch.testing.assert_close(logits(tmp_path), want, atol=1e-3, rtol=2e-4)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """A checkpoint whose configuration does not say whether its head is its embedding table, as published."""
    make_reference("mistral", tie_word_embeddings=False).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values.pop("tie_word_embeddings")
    values["text_config"].pop("tie_word_embeddings", None)
    path.write_text(json.dumps(values))
    return tmp_path


def test_the_language_models_own_default_says_whether_its_head_is_tied(untied: Path) -> None:
    assert load_hf_config(str(untied)).tie_word_embeddings is False
    logits(untied)


def test_a_tied_head_that_is_another_matrix_is_refused(untied: Path) -> None:
    with pytest.raises(StartupError, match=r"lm_head\.weight is not its embedding table.*tie_word_embeddings\": false"):
        logits(untied, {"tie_word_embeddings": True})


def test_overrides_reach_the_language_model(untied: Path) -> None:
    for overrides in ({"max_position_embeddings": 99}, {"text_config": {"max_position_embeddings": 99}}):
        config = load_hf_config(str(untied), overrides)
        assert (config.max_position_embeddings, config.hidden_size) == (99, 32)


def test_a_language_model_that_is_not_served(untied: Path) -> None:
    with pytest.raises(
        StartupError, match=r"language model \(text_config\) of model type 'llama'; supported: mistral, mini"
    ):
        load_hf_config(str(untied), {"text_config": {"model_type": "llama"}})
    with pytest.raises(StartupError, match=r"text_config must be an object, got 5\."):
        load_hf_config(str(untied), {"text_config": 5})


def test_every_kind_of_language_model_has_a_case() -> None:
    kinds = {(ARCHITECTURES[architecture], text["model_type"]) for architecture, text, _ in CASES.values()}
    assert kinds == {(whole, text) for whole, texts in TEXT_PARTS.items() for text in texts}
