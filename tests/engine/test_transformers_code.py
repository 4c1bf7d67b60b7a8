"""An engine whose network is transformers' own code: pins, chunks and batches as with any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engine.helpers import Request, assert_nothing_held, greedy, make_engine, run, tokens
from vllm.exceptions import StartupError

NEW = 12
CASES = [
    pytest.param("gpt_neox", {}, id="gpt_neox"),
    pytest.param(
        "vaultgemma",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
        },
        id="vaultgemma",
        marks=pytest.mark.nightly,
    ),
]


def make_checkpoint(model_type: str, changes: dict[str, Any], tokenizer_of: Path, folder: Path) -> Any:
    """A network of two layers with random weights, saved beside a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = CONFIG_MAPPING[model_type](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
        **changes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_tokens_are_those_of_transformers_alone(
    model_type: str, changes: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    reference = make_checkpoint(model_type, changes, tiny_model_dir, tmp_path)
    engine = make_engine(tmp_path, max_num_batched_tokens=64, max_num_seqs=8)
    assert engine.vllm_config.model.impl == "transformers"
    text = [(31 * i * i + 7 * i) % 40000 + 100 for i in range(400)]
    system = text[:150]
    requests = [Request(text[200 : 200 + n]) for n in (3, 70)]
    requests += [Request(system + text[300 : 300 + n], len(system)) for n in (1, 17, 80)]
    want = []
    for request in requests:
        ids = torch.tensor([request.token_ids])
        with torch.inference_mode():
            out = reference.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        want.append(out[0, ids.shape[1] :].tolist())
    try:
        assert tokens(run(engine, requests, greedy(NEW))) == want
        later = run(engine, requests[2:], greedy(NEW))
        assert tokens(later) == want[2:]
        # Beside the pinned prompt, full blocks of what follows it.
        assert [output.num_cached_tokens for output in later] == [150, 166, 214]
        assert_nothing_held(engine)
    finally:
        engine.shutdown()


def test_a_llama_runs_through_transformers_if_it_is_asked_to(tiny_model_dir: Path) -> None:
    request = Request(list(range(100, 170)), 40)
    found = []
    for impl in ("vllm", "transformers"):
        engine = make_engine(tiny_model_dir, model_impl=impl)
        try:
            found.append(tokens(run(engine, [request], greedy(NEW))))
            assert engine.vllm_config.model.impl == impl
        finally:
            engine.shutdown()
    assert found[0] == found[1]


def test_other_architectures_are_refused_where_only_ours_may_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_checkpoint("gpt_neox", {}, tiny_model_dir, tmp_path)
    with pytest.raises(StartupError, match="GPTNeoXForCausalLM of model type 'gpt_neox'"):
        make_engine(tmp_path, model_impl="vllm")
    with pytest.raises(StartupError, match="--model-impl"):
        make_engine(tmp_path, quantization="int8_cpu")


def test_a_checkpoint_that_cannot_work_says_why(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_checkpoint("diffllama", {"num_key_value_heads": 2}, tiny_model_dir, tmp_path)
    with pytest.raises(StartupError, match=r"DiffLlamaForCausalLM .*no plain self-attention"):
        make_engine(tmp_path)
