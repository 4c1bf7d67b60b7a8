"""Networks of which some layers read a window: tokens as transformers generates them, and memory for windows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from tests.engine.helpers import Request, add, assert_nothing_held, greedy, make_engine, run, tokens
from vllm.attention.layer import Attention
from vllm.core.pinned_prompt import BlockCount
from vllm.core.system_prompt_pool import SystemPromptRefusedError
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.engine.llm_engine import LLMEngine
from vllm.kv_cache.windows import KVMemory, WindowLayout
from vllm.model_executor.models.decoder import attention_spec
from vllm.model_executor.models.registry import decoder_spec
from vllm.ops.cpu import kernels as cpu_kernels

WINDOW = 40
VOCABULARY = 300


@pytest.fixture(scope="module")
def windowed_model(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, PreTrainedModel]:
    """A Gemma 3 of six layers with random weights, five of which read a window of 40 tokens; its folder, and the model
    as transformers runs it."""
    folder = tmp_path_factory.mktemp("windowed_model")
    config = Gemma3TextConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2,
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


@pytest.fixture(params=[pytest.param("TORCH", marks=pytest.mark.nightly), "CPU"])
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

    @cache
    @torch.inference_mode()
    def generate(prompt: tuple[int, ...], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return lambda prompt, count: generate(tuple(prompt), count)


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()


def kept_blocks(engine: LLMEngine) -> list[int]:
    return [sum(e.num_blocks for e in p.window_extents) for p in engine.core.pool.prompts()]


def test_memory_is_split_between_the_groups(make_windowed: Callable[..., LLMEngine]) -> None:
    engine = make_windowed()
    cache = engine.core.executor._worker.runner.cache
    slots = [len(k) for k in cache.k_caches]
    of_windows = cache.window.num_blocks * 16
    assert slots == [*[of_windows] * 3, 128 * 16, *[of_windows] * 2] and of_windows < 128 * 16


def test_a_pin_of_gemma_3_27b_takes_less_than_a_third_of_all_keys_and_values() -> None:
    """The sizes that are planned for its layers: 52 of 62 read 1,024 tokens."""
    config = Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        sliding_window=1024,
        architectures=["Gemma3ForCausalLM"],
    )
    layers = decoder_spec(config, 131072).layers
    wishes = [attention_spec(layer.mixer, TensorParallelGroup(), torch.bfloat16) for layer in layers]
    memory = KVMemory.of(0, [Attention(i, wish).cache for i, wish in enumerate(wishes)], 16)
    whole = memory.block_bytes + memory.window_block_bytes
    assert (memory.window, whole) == (1024, 62 * 16 * 2 * 16 * 128 * 2)
    size = BlockCount.of(32768, 16, WindowLayout(1024, 16, 8192))
    assert size.full * memory.block_bytes + size.window * memory.window_block_bytes <= 0.3 * 2048 * whole


def test_a_long_pin_takes_less_than_a_third_of_all_keys_and_values(make_windowed: Callable[..., LLMEngine]) -> None:
    """A pin of 12 windows in a real cache."""
    engine = make_windowed(num_gpu_blocks_override=256, max_model_len=600)
    cache = engine.core.executor._worker.runner.cache
    run(engine, [Request(text(490, 1), 480)], greedy(2))
    (prompt,) = engine.core.pool.prompts()
    tensors = [*cache.k_caches, *cache.v_caches]
    whole = 480 * sum(tensor[0].nbytes for tensor in tensors)
    (info,) = engine.list_system_prompts()
    held = [
        sum(e.num_blocks for e in extents) * 16 * sum(t[0].nbytes for t in group.tensors)
        for group, extents in ((cache.full, prompt.extents), (cache.window, prompt.window_extents))
    ]
    assert info.num_bytes == sum(held) <= 0.3 * whole
    pool = engine.system_prompt_pool()
    assert pool.pinned_bytes == info.num_bytes < pool.budget_bytes


def test_short_prompts_fill_the_budget_of_the_window_layers_first(make_windowed: Callable[..., LLMEngine]) -> None:
    """A refusal says so, and a larger budget is one of both groups. Requests of any length still run."""
    engine = make_windowed(
        num_gpu_blocks_override=512, system_prompt_cache_fraction=0.2, max_num_batched_tokens=64, max_num_seqs=8
    )
    pool = engine.core.pool

    def fill(count: int) -> int:
        """Adds prompts of three blocks until one is refused; returns how many there are."""
        for i in range(count):
            engine.add_system_prompt(text(WINDOW, 1000 + i))
        with pytest.raises(SystemPromptRefusedError) as refused:
            engine.add_system_prompt(text(WINDOW, 1000 + count))
        assert refused.value.outcome == "over_budget"
        assert "The layers that read 40 tokens would keep the last 48 of the system prompt's" in str(refused.value)
        return len(pool.prompts())

    windows = engine.core.scheduler.blocks.windows
    budget = int(0.2 * windows.num_blocks)
    assert fill(budget // 3) * 3 <= budget < pool.blocks.budget_blocks
    pool.set_budget(512 * 16)
    most = windows.num_blocks - windows.layout.most_blocks(512)
    assert fill(most // 3) * 3 <= most
    run(engine, [Request(text(450, seed)) for seed in range(3)], greedy(20))
    assert len(pool.prompts()) == most // 3
    assert_nothing_held(engine)


def test_more_long_requests_run_at_once(make_windowed: Callable[..., LLMEngine]) -> None:
    """In the memory that four of them would take with all keys and values of all layers."""
    memory = {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 4 * 480 * 6 * 256}
    engine = make_windowed(**memory, max_num_seqs=16, max_num_batched_tokens=256)
    prompts = [Request(text(456, seed)) for seed in range(12)]
    for i, request in enumerate(prompts):
        add(engine, str(i), request, greedy(24))
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, engine.core.scheduler.num_running)
    assert 7 <= most <= 12


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


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_preempted_requests_go_on_with_the_same_tokens(
    make_windowed: Callable[..., LLMEngine], expected: Callable[..., list[int]]
) -> None:
    engine = make_windowed(num_gpu_blocks_override=32, max_num_batched_tokens=64, max_num_seqs=8)
    head = text(50, 1)
    prompts = [[*head, *text(60 + i, 10 + i)] for i in range(4)]
    outputs = run(engine, [Request(prompt, 50) for prompt in prompts], greedy(32))
    assert engine.core.scheduler.num_preemptions > 0
    assert tokens(outputs) == [expected(prompt, 32) for prompt in prompts]
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
    engine = make_windowed(num_gpu_blocks_override=512, max_num_batched_tokens=64, max_num_seqs=4)
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
