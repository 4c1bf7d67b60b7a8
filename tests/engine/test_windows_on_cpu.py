"""A network whose layers have windows, run by the compiled CPU kernels: its greedy tokens are those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.engine.helpers import Request, assert_nothing_held, greedy, make_engine, run, tokens
from vllm.attention.backends.cpu import CpuAttentionBackend
from vllm.ops.cpu import kernels as cpu_kernels

WINDOW = 24
SYSTEM = [(11 * i * i + 5) % 300 for i in range(61)]
SHORT_SYSTEM = [(13 * i * i + 7) % 300 for i in range(10)]
NUM_TOKENS = 40
REQUESTS = [
    Request([*SYSTEM, 7, 8, 9], len(SYSTEM)),
    Request([*SYSTEM, *range(100, 150)], len(SYSTEM)),
    Request([*SHORT_SYSTEM, 4], len(SHORT_SYSTEM)),
    Request([*SHORT_SYSTEM, *range(200, 233)], len(SHORT_SYSTEM)),
    Request(list(range(40, 130))),
    Request([3, 4, 5]),
]


@pytest.fixture(scope="module")
def gemma_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Gemma 3 of three layers, two of them with a window, with random weights and the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("gemma3")
    for file in tiny_model_dir.iterdir():
        if file.name not in ("config.json", "generation_config.json") and file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    config = Gemma3TextConfig(
        vocab_size=49152,  # of the tokenizer
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=WINDOW,
        max_position_embeddings=512,
        initializer_range=0.3,
        final_logit_softcapping=20.0,
        tie_word_embeddings=False,  # or each token makes itself the most likely next one
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=None,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    yield folder


@pytest.mark.skipif(cpu_kernels.library() is None, reason="the compiled CPU kernels are not built")
def test_tokens_behind_pinned_prompts_are_those_of_transformers(gemma_dir: Path) -> None:
    # Chunks of at most 23 tokens: prompts are computed in pieces, beside the decodes of others.
    engine = make_engine(gemma_dir, max_num_batched_tokens=23, max_num_seqs=8)
    worker = engine.core.executor._worker
    assert isinstance(worker.backend, CpuAttentionBackend) and worker.model.program is not None
    together = tokens(run(engine, REQUESTS, greedy(NUM_TOKENS)))
    again = [tokens(run(engine, [request], greedy(NUM_TOKENS)))[0] for request in REQUESTS]
    assert engine.core.pool.num_prefills == 2
    assert again == together
    assert_nothing_held(engine)
    # The layers in one call, the rest of a step in torch.
    worker.runner._compiled = None
    assert tokens(run(engine, REQUESTS, greedy(NUM_TOKENS))) == together
    engine.shutdown()

    model = Gemma3ForCausalLM.from_pretrained(gemma_dir, dtype=torch.float32, attn_implementation="eager")
    for request, output in zip(REQUESTS, together, strict=True):
        # Greedy, if every token is the most likely one after those before it.
        with torch.inference_mode():
            logits = model(torch.tensor([[*request.token_ids, *output[:-1]]]), use_cache=False).logits[0]
        assert output == logits[-NUM_TOKENS:].argmax(dim=-1).tolist()
        assert len(set(output)) > NUM_TOKENS // 4  # not the same token over and over
