"""Networks of which some layers read a window: tokens as transformers generates them, and memory for windows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from tests.engine.helpers import Request, assert_nothing_held, greedy, make_engine, run, tokens
from vllm.engine.llm_engine import LLMEngine
from vllm.ops.cpu import kernels as cpu_kernels

WINDOW = 40
VOCABULARY = 300


@pytest.fixture(scope="module")
def windowed_model(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, PreTrainedModel]:
    """A Gemma 3 of three layers with random weights, two of which read a window of 40 tokens; its folder, and the model
    as transformers runs it."""
    folder = tmp_path_factory.mktemp("windowed_model")
    config = Gemma3TextConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=1024,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tiny_model_dir / name).exists():
            (folder / name).write_bytes((tiny_model_dir / name).read_bytes())
    return folder, model


@pytest.fixture(params=["TORCH", "CPU"])
def make_windowed(
    request: pytest.FixtureRequest, windowed_model: tuple[Path, PreTrainedModel]
) -> Iterator[Callable[..., LLMEngine]]:
    """Engines whose layers torch drives one by one, and such whose steps are calls into the compiled kernels."""
    if request.param == "CPU" and cpu_kernels.library() is None:
        pytest.skip("the compiled CPU kernels are not built")
    engines: list[LLMEngine] = []

    def make(**args: Any) -> LLMEngine:
        options = {"attention_backend": request.param, "max_model_len": 512, "num_gpu_blocks_override": 128}
        engines.append(make_engine(windowed_model[0], **(options | args)))
        runner = engines[-1].core.executor._worker.runner
        assert (runner._compiled is not None) == (request.param == "CPU") and runner.cache.window is not None
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.fixture(scope="module")
def expected(windowed_model: tuple[Path, PreTrainedModel]) -> Callable[[list[int], int], list[int]]:
    """The greedy continuation of a prompt by transformers, without a cache."""
    model = windowed_model[1]

    @torch.inference_mode()
    def generate(prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return generate


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()


def kept_blocks(engine: LLMEngine) -> list[int]:
    return [sum(e.num_blocks for e in p.window_extents) for p in engine.core.pool.prompts()]


def test_memory_is_split_between_the_groups(make_windowed: Callable[..., LLMEngine]) -> None:
    engine = make_windowed()
    cache = engine.core.executor._worker.runner.cache
    slots = [len(k) for k in cache.k_caches]
    assert slots[1] == 128 * 16 and slots[0] == slots[2] == cache.window.num_blocks * 16 < slots[1]


@pytest.mark.parametrize(
    ("system", "budget"),
    [(0, 16), (7, 16), (WINDOW - 2, 512), (WINDOW - 1, 48), (WINDOW, 16), (WINDOW + 1, 48), (100, 16), (100, 512)],
)
def test_tokens_are_those_of_transformers(
    make_windowed: Callable[..., LLMEngine], expected: Callable[..., list[int]], system: int, budget: int
) -> None:
    """Pins shorter and longer than the window, chunks across its edge; the first reader and later ones."""
    engine = make_windowed(max_num_batched_tokens=budget, max_num_seqs=8)
    head = text(system, 1)
    prompts = [[*head, *text(own, 2 + own)] for own in (3, 30, WINDOW + 15)]
    requests = [Request(prompt, system or None) for prompt in prompts]
    wanted = [expected(prompt, 24) for prompt in prompts]
    assert tokens(run(engine, requests, greedy(24))) == wanted
    assert tokens(run(engine, requests, greedy(24))) == wanted, "with what is cached"
    if system:
        assert kept_blocks(engine) == [-(-system // 16) - max(0, system - WINDOW + 1) // 16]
    assert_nothing_held(engine)
    assert engine.core.scheduler.blocks.windows.num_used_blocks == 0


def test_nested_prompts_read_windows_across_their_edges(
    make_windowed: Callable[..., LLMEngine], expected: Callable[..., list[int]]
) -> None:
    engine = make_windowed()
    ids = text(200, 5)
    lengths = [70, 83, 120]
    for length in lengths:
        engine.add_system_prompt(ids[:length])
    prompts = [[*ids[:length], *text(own, own)] for length in lengths for own in (1, 20)]
    outputs = run(engine, [Request(p, n) for p, n in zip(prompts, [70, 70, 83, 83, 120, 120], strict=True)], greedy(12))
    assert tokens(outputs) == [expected(prompt, 12) for prompt in prompts]
    assert {p.num_tokens: p.num_own_tokens for p in engine.core.pool.prompts()} == {70: 70, 83: 13, 120: 37}


def test_preempted_requests_go_on_with_the_same_tokens(
    make_windowed: Callable[..., LLMEngine], expected: Callable[..., list[int]]
) -> None:
    engine = make_windowed(num_gpu_blocks_override=32, max_num_batched_tokens=64, max_num_seqs=8)
    head = text(50, 1)
    prompts = [[*head, *text(60 + i, 10 + i)] for i in range(6)]
    outputs = run(engine, [Request(prompt, 50) for prompt in prompts], greedy(48))
    assert engine.core.scheduler.num_preemptions > 0
    assert tokens(outputs) == [expected(prompt, 48) for prompt in prompts]
    assert_nothing_held(engine)


def test_outputs_of_one_prompt_share_its_window(
    make_windowed: Callable[..., LLMEngine], expected: Callable[..., list[int]]
) -> None:
    engine = make_windowed()
    prompt = text(117, 3)
    (output,) = run(engine, [Request(prompt, 50)], greedy(20, n=3))
    wanted = expected(prompt, 20)
    assert [list(one.token_ids) for one in output.outputs] == [wanted] * 3
    assert_nothing_held(engine)


def test_many_requests_hold_no_more_than_their_windows(make_windowed: Callable[..., LLMEngine]) -> None:
    """The window group is smaller than what the requests have computed together."""
    engine = make_windowed(num_gpu_blocks_override=160, max_num_batched_tokens=64, max_num_seqs=4)
    windows = engine.core.scheduler.blocks.windows
    prompts = [text(400, seed) for seed in range(4)]
    assert windows.num_blocks * 16 < sum(map(len, prompts))
    run(engine, [Request(prompt) for prompt in prompts], greedy(40))
    assert engine.core.scheduler.num_preemptions == 0


def test_host_tier_keeps_windows(make_windowed: Callable[..., LLMEngine], expected: Callable[..., list[int]]) -> None:
    """Two prompts take turns on a device that has room for one of them."""
    engine = make_windowed(
        num_gpu_blocks_override=64,
        system_prompt_cache_tokens=144,
        system_prompt_host_cache_gib=0.01,
        enable_prefix_caching=False,
    )
    prompts = [[*text(130, seed), *text(9, 10 + seed)] for seed in (1, 2)]
    wanted = [expected(prompt, 10) for prompt in prompts]
    for _ in range(5):
        for prompt, its_tokens in zip(prompts, wanted, strict=True):
            assert tokens(run(engine, [Request(prompt, 130)], greedy(10))) == [its_tokens]
    assert engine.core.pool.num_prefills < 8, "some came back from the host"
    assert_nothing_held(engine)


def test_snapshots_keep_windows(
    make_windowed: Callable[..., LLMEngine], expected: Callable[..., list[int]], tmp_path: Path
) -> None:
    ids = text(150, 4)
    prompts = [[*ids[:length], *text(5, length)] for length in (90, 150)]
    wanted = [expected(prompt, 10) for prompt in prompts]
    for attempt in range(2):
        engine = make_windowed(system_prompt_cache_dir=str(tmp_path))
        for length in (90, 150):
            engine.add_system_prompt(ids[:length])
        assert tokens(run(engine, [Request(p, len(p) - 5) for p in prompts], greedy(10))) == wanted
        assert engine.core.pool.num_prefills == (0 if attempt else 2)
        engine.shutdown()
