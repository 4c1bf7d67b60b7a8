"""Two ranks that share a model give what one gives, whatever the pool and the scheduler do meanwhile."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from tests.conftest import ServerFactory
from tests.engine.helpers import Request, add, assert_nothing_held, finish, greedy, make_engine, run, tokens
from tests.engine.test_gpu import make_llama
from tests.warm_start import Nursery
from vllm.engine.llm_engine import LLMEngine
from vllm.exceptions import StartupError
from vllm.executor.multiproc import Rank, take_agreed
from vllm.sampling_params import SamplingParams
from vllm.step import EndedJob

SYSTEM = list(range(300, 420))
REQUESTS = [Request(SYSTEM + list(range(10 + i, 40 + 3 * i)), len(SYSTEM)) for i in range(4)]
REQUESTS += [Request(list(range(20, 180))), Request([7, 8, 9])]
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=12, ignore_eos=True, logprobs=2)


FLAGS = {"max_model_len": 256, "num_gpu_blocks_override": 64, "max_num_batched_tokens": 64, "max_num_seqs": 16}


@pytest.fixture
def warm_ranks(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rank, "command", nursery.command("vllm.executor.rank_process"))


@pytest.fixture
def make_pair(make_tiny: Callable[..., LLMEngine], warm_ranks: None) -> Callable[..., LLMEngine]:
    """Engines of two ranks with few blocks; one at a time."""
    return lambda **args: make_tiny(**(FLAGS | {"tensor_parallel_size": 2} | args))


def test_tokens_are_those_of_one_rank(
    make_tiny: Callable[..., LLMEngine], make_pair: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    """Greedy and sampled, pinned, preempted, beside requests that go away, from the host tier, and from the snapshots
    of which each rank has a part."""
    many = [Request(list(range(20 + i, 160 + i))) for i in range(8)]
    alone = make_tiny(**FLAGS)
    want = [tokens(run(alone, REQUESTS, params)) for params in (greedy(12), SAMPLED)]
    want_many = tokens(run(alone, many, greedy(60)))

    tiers = {"system_prompt_cache_dir": str(tmp_path), "system_prompt_host_cache_gib": 0.01}
    pair = make_pair(**tiers)
    for _ in range(2):
        assert [tokens(run(pair, REQUESTS, params)) for params in (greedy(12), SAMPLED)] == want
    assert [prompt.state for prompt in pair.list_system_prompts()] == ["pinned"]

    for i, request in enumerate(many):
        add(pair, f"many-{i}", request, greedy(60))
    for _ in range(20):
        pair.step()
    pair.abort_request(["many-5", "many-6"])
    outputs = finish(pair)
    assert pair.core.scheduler.num_preemptions
    kept = [i for i in range(8) if i not in (5, 6)]
    assert [list(outputs[f"many-{i}"].outputs[0].token_ids) for i in kept] == [want_many[i] for i in kept]

    # Others take the prompt's place, and it comes back from the host.
    others = [Request([(29 * i + j) % 4000 for j in range(230)], 220) for i in range(3)]
    for other in others:
        for _ in range(2):
            run(pair, [other, other], greedy(2))
    assert [tokens(run(pair, REQUESTS, params)) for params in (greedy(12), SAMPLED)] == want
    assert_nothing_held(pair)
    deadline = time.monotonic() + 60
    while not pair.core.pool.tiers.outcomes.get(("save", "ok")):
        assert time.monotonic() < deadline, dict(pair.core.pool.tiers.outcomes)
        pair.step()
    finish(pair)
    pair.shutdown()

    again = make_pair(**tiers)
    found = run(again, REQUESTS[:1], greedy(12))
    assert (tokens(found), found[0].num_cached_tokens) == (want[0][:1], len(SYSTEM))
    assert again.core.pool.num_prefills == 0


def test_more_ranks_than_kv_heads(make_tiny: Callable[..., LLMEngine], make_pair: Callable[..., LLMEngine]) -> None:
    """Some have the same ones."""
    want = [tokens(run(make_tiny(**FLAGS), REQUESTS, params)) for params in (greedy(12), SAMPLED)]
    many = make_pair(tensor_parallel_size=4)
    assert [tokens(run(many, REQUESTS, params)) for params in (greedy(12), SAMPLED)] == want


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_tokens_on_two_gpus(tmp_path: Path, enforce_eager: bool) -> None:
    make_llama(tmp_path, 2, 512)
    flags = FLAGS | {"enforce_eager": enforce_eager, "device": "cuda"}
    found = []
    for ranks in (1, 2):
        engine = make_engine(tmp_path, **flags, tensor_parallel_size=ranks)
        found.append([tokens(run(engine, REQUESTS, params)) for params in (greedy(12), SAMPLED) for _ in range(2)])
        assert_nothing_held(engine)
        engine.shutdown()
    assert found[0] == found[1]


def test_a_rank_that_cannot_start_says_why_in_one_line(
    make_pair: Callable[..., LLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    with pytest.raises(StartupError, match="names processors for 1 ranks"):
        make_pair()
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    with pytest.raises(StartupError, match=r"attention heads \(4\) cannot be split over 3 tensor-parallel ranks"):
        make_pair(tensor_parallel_size=3)


@pytest.mark.nightly
def test_a_rank_that_dies_ends_the_engine(server_factory: ServerFactory, tiny_model_dir: Path) -> None:
    """Open requests get an error, and the engine that takes the place of the dead one has its ranks."""
    server = server_factory(
        "--model", str(tiny_model_dir), "-tp", "2", "--engine-restarts", "1", "--num-gpu-blocks-override", "64",
        "--max-model-len", "512", cold=True,
    )  # fmt: skip

    def ask(max_tokens: int) -> httpx.Response:
        body = {
            "model": server.model,
            "prompt": [5, 6, 7],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)

    first = ask(8)
    assert first.status_code == 200
    (rank,) = [
        p for p in psutil.Process(server.process.pid).children(recursive=True) if "rank_process" in str(p.cmdline())
    ]
    with ThreadPoolExecutor(1) as threads:
        open_request = threads.submit(ask, 500)
        time.sleep(0.3)
        rank.kill()
        assert open_request.result().status_code in (500, 503)
    deadline = time.monotonic() + 120
    while httpx.get(f"{server.url}/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert ask(8).json()["choices"] == first.json()["choices"]


def test_what_has_ended_on_some_ranks_only_has_not_ended() -> None:
    save, load = EndedJob("save", "a", "ok"), EndedJob("load", "b", "ok")
    ended = [deque([save, load]), deque([save])]
    assert take_agreed(ended) == [save]
    assert take_agreed(ended) == []
    ended[1].append(EndedJob("load", "b", "missing"))
    assert take_agreed(ended) == [EndedJob("load", "b", "missing")]
