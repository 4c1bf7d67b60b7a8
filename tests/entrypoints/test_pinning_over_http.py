"""The promise, as a client sees it: a system prompt is computed once and never again, and nothing leaks."""

import asyncio
import json
import random
import re
import time

import aiohttp
import httpx
import pytest

# 4,096 tokens of context: the floor is 256 blocks of 16. 640 blocks are 10,240 tokens, half of which may be pinned.
ARGS = ("--dtype", "float32", "--max-model-len", "4096", "--num-gpu-blocks-override", "640")
PINNED_TOKENS = 3000


@pytest.fixture(scope="module")
def tiny_server(server_factory, tiny_model_dir):
    return server_factory("--model", str(tiny_model_dir), *ARGS, "--max-logprobs", "-1")


def words(seed, count):
    rng = random.Random(seed)
    return " ".join(rng.choice(("tide", "lamp", "oak", "ferry", "ledger", "salt", "bridge")) for _ in range(count))


def body(system, user, **options):
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "messages": [*messages, {"role": "user", "content": user}],
        "temperature": 0,
        "max_tokens": 4,
        "ignore_eos": True,
        **options,
    }


async def chat(session, server, *args, **options):
    async with session.post(f"{server.url}/v1/chat/completions", json=body(*args, **options)) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer


async def metric(session, server, name, **labels):
    """Sum of a metric over the series that carry `labels`."""
    async with session.get(f"{server.url}/metrics") as response:
        text = await response.text()
    total = 0.0
    for line in text.splitlines():
        found = re.match(r"([a-z_:]+)\{(.*)\} (\S+)$", line)
        if found and found[1] == name and all(f'{k}="{v}"' in found[2] for k, v in labels.items()):
            total += float(found[3])
    return total


async def prompts(session, server):
    async with session.get(f"{server.url}/v1/system_prompts") as response:
        return (await response.json())["data"]


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def run(coroutine_function, *args):
    async def go():
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await coroutine_function(session, *args)

    asyncio.run(go())


def test_a_long_system_prompt_is_paid_once_whatever_happens_later(tiny_server):
    async def go(session):
        system = words("long", PINNED_TOKENS)
        first = await chat(session, tiny_server, system, "First question")
        assert cached(first) == 0
        (pinned,) = [p for p in await prompts(session, tiny_server) if p["num_tokens"] >= PINNED_TOKENS]
        size = pinned["num_tokens"]
        assert cached(await chat(session, tiny_server, system, "Second")) == size

        # A flood of other prompts, together larger than the KV cache, at the same time as requests that need the pin.
        flood = [chat(session, tiny_server, None, words(i, 900)) for i in range(16)]
        during = [chat(session, tiny_server, system, f"Now {i}") for i in range(4)]
        answers = await asyncio.gather(*during, *flood)
        assert [cached(a) for a in answers[:4]] == [size] * 4
        assert cached(await chat(session, tiny_server, system, "Third")) == size

        before = time.monotonic()
        await asyncio.sleep(3)
        assert time.monotonic() - before >= 3
        repeated = await chat(session, tiny_server, system, "First question")
        assert cached(repeated) == size
        assert repeated["choices"][0]["message"] == first["choices"][0]["message"]

    run(go)


def test_a_herd_of_cold_requests_computes_the_prompt_once(tiny_server):
    async def go(session):
        system = words("herd", 600)
        before = await metric(session, tiny_server, "vllm:system_prompt_prefills_total")
        answers = await asyncio.gather(*(chat(session, tiny_server, system, f"Question {i}") for i in range(50)))
        assert await metric(session, tiny_server, "vllm:system_prompt_prefills_total") == before + 1
        counts = sorted(cached(a) for a in answers)
        (pinned,) = [p for p in await prompts(session, tiny_server) if 600 <= p["num_tokens"] < 700]
        assert counts == [0] + [pinned["num_tokens"]] * 49
        assert pinned["hits"] == 49 and pinned["readers"] == 0

    run(go)


@pytest.mark.nightly
def test_a_thousand_requests_with_clients_that_leave_leak_nothing(server_factory, tiny_model_dir):
    server = server_factory("--model", str(tiny_model_dir), *ARGS, "--max-num-seqs", "24")

    async def one(session, i, rng_value):
        system = f"Rules of house {i % 40}. " + words(i % 40, 60)
        if rng_value > 0.25:
            answer = await chat(session, server, system, f"Question {i}", max_tokens=3)
            assert answer["usage"]["completion_tokens"] == 3
            return
        # Leaves in the middle, or before the first token.
        data = body(system, f"Question {i}", max_tokens=200, stream=rng_value > 0.1)
        try:
            async with asyncio.timeout(rng_value * 2):
                async with session.post(f"{server.url}/v1/chat/completions", json=data) as response:
                    await response.content.readline()
        except TimeoutError:
            pass

    async def go(session):
        rng = random.Random(1)
        order = list(range(1000))
        rng.shuffle(order)
        gate = asyncio.Semaphore(48)

        async def gated(i):
            async with gate:
                await one(session, i, rng.random())

        await asyncio.gather(*(gated(i) for i in order))
        for _ in range(600):
            running = await metric(session, server, "vllm:num_requests_running")
            waiting = await metric(session, server, "vllm:num_requests_waiting")
            if running == waiting == 0:
                break
            await asyncio.sleep(0.1)
        assert running == waiting == 0
        assert await metric(session, server, "vllm:kv_cache_usage_perc") == 0
        assert await metric(session, server, "vllm:system_prompt_prefills_total") == 40
        pinned = await prompts(session, server)
        assert len(pinned) == 40 and all(p["readers"] == 0 and p["state"] == "pinned" for p in pinned)

    run(go)


def test_answers_do_not_depend_on_the_pool(tiny_server, server_factory, tiny_model_dir):
    without = server_factory("--model", str(tiny_model_dir), *ARGS, "--system-prompt-cache", "off")

    async def go(session):
        for i in range(6):
            question = body(words(i, 40), words(-i, 10 + i), max_tokens=24)
            async with session.post(f"{tiny_server.url}/v1/chat/completions", json=question) as response:
                on = json.loads(await response.text())
            async with session.post(f"{without.url}/v1/chat/completions", json=question) as response:
                off = json.loads(await response.text())
            assert on["choices"] == off["choices"]
        assert not await prompts(session, without)

    run(go)


def test_log_probabilities_of_the_whole_vocabulary_where_the_operator_allows_them(tiny_server):
    def post(path, **body):
        answer = httpx.post(f"{tiny_server.url}/v1/{path}", json={"max_tokens": 1, **body}, timeout=60)
        assert answer.status_code == 200, answer.text[:300]
        return answer.json()["choices"][0]

    fields = {"logprobs": -1, "prompt_logprobs": -1, "return_tokens_as_token_ids": True}
    choice = post("completions", prompt="One two", **fields)
    vocab_size = len(choice["logprobs"]["top_logprobs"][0])
    assert vocab_size > 40_000
    assert all(len(row) == vocab_size for row in choice["prompt_logprobs"][1:])
    choice = post("chat/completions", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=-1)
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == vocab_size
