from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from vllm.exceptions import StartupError
from vllm.model_executor.model_loader import iterate_weights

TENSORS = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((4, 3), float(i)) for i in range(6)}


def load(folder: Path) -> dict[str, torch.Tensor]:
    return dict(iterate_weights(str(folder), "safetensors", LlamaConfig()))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = sorted(TENSORS)
    files = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, held in files.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def change_index(folder: Path, **entries: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= entries
    path.write_text(json.dumps(index))


def test_a_single_file(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(TENSORS | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_stored_types_are_kept(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "other-name.safetensors")
    assert load(tmp_path)["a"].dtype == torch.bfloat16


def test_shards(sharded: Path) -> None:
    loaded = load(sharded)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_progress_is_shown_on_stderr(sharded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(sharded)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading weights" in err
    assert "6/6" in err


def test_a_missing_shard_is_named_before_anything_is_loaded(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    weights = iterate_weights(str(sharded), "safetensors", LlamaConfig())
    with pytest.raises(StartupError, match=r"model-00002-of-00002.*missing"):
        next(weights)


def test_a_shard_that_lacks_its_tensor_is_named(sharded: Path) -> None:
    change_index(sharded, **{"lm_head.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(StartupError, match=r"model-00001-of-00002.*lacks the tensor lm_head\.weight"):
        load(sharded)


def test_an_index_cannot_point_outside(sharded: Path) -> None:
    change_index(sharded, **{"lm_head.weight": "../secret.safetensors"})
    with pytest.raises(StartupError, match="outside"):
        load(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(StartupError, match=r"index\.json"):
        load(sharded)


@pytest.mark.parametrize("kept", [0, 5, 60, -8])
def test_a_truncated_file_is_named(sharded: Path, kept: int) -> None:
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StartupError, match=r"model-00001-of-00002.*truncated or damaged"):
        load(sharded)


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    with pytest.raises(StartupError, match=r"model\.safetensors"):
        load(tmp_path)


def test_several_files_without_index_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(StartupError, match="2 safetensors files"):
        load(tmp_path)


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="'pickle'"):
        next(iterate_weights(str(tmp_path), "pickle", LlamaConfig()))


def test_gguf_weights_have_hugging_face_names(default_model_path: str) -> None:
    from vllm.transformers_utils.config import load_hf_config

    config = load_hf_config(default_model_path)
    name, tensor = next(iterate_weights(default_model_path, "gguf", config))
    assert name == "model.embed_tokens.weight"
    assert tensor.shape == (49152, 576)
    assert tensor.dtype == torch.float32
