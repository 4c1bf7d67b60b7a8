"""Whether the time of an answer tells a client what clients of other namespaces have sent."""

from __future__ import annotations

import math
import random
import time

import httpx
import pytest

pytestmark = pytest.mark.nightly

KEYS = ("key-of-a", "key-of-b")
SYSTEM = "You are the night porter of a small hotel by the sea. Answer politely, in at most two sentences."
WORDS = [f"{word}{i}" for i in range(40) for word in ("tide", "lamp", "oak", "ferry", "ledger")]
PAIRS = 150


@pytest.fixture(scope="module")
def server(server_factory, tiny_model_dir):
    flags = ("--dtype", "float32", "--max-model-len", "2048", "--num-gpu-blocks-override", "8000")
    return server_factory("--model", str(tiny_model_dir), *flags, "--api-key", *KEYS, api_key=KEYS[0])


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def ask(client, text, key, salt=None):
    """(Seconds, usage) of an answer of one token."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": 1, "temperature": 0} | ({"cache_salt": salt} if salt else {})
    begun = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    seconds = time.perf_counter() - begun
    assert answer.status_code == 200, answer.text
    return seconds, answer.json()["usage"]


def share_of_luck(wins, rounds):
    """How likely it is that of so many tosses of a coin at least so many, or so few, are heads."""
    tail = sum(math.comb(rounds, k) for k in range(max(wins, rounds - wins), rounds + 1))
    return min(1.0, 2 * tail / 2**rounds)


def quicker(client, rng, sender, asker):
    """In how many pairs of requests the one whose text `sender` had sent was the quicker one for `asker`."""
    wins = 0
    for _ in range(PAIRS):
        # The same words in another order: equally long, and nothing in common.
        sent, unsent = (" ".join(rng.sample(WORDS, len(WORDS))) for _ in range(2))
        ask(client, sent, *sender)
        pair = [sent, unsent]
        rng.shuffle(pair)
        found = {text: ask(client, text, *asker) for text in pair}
        wins += found[sent][0] < found[unsent][0]
        if sender != asker:
            assert found[sent][1] == found[unsent][1]
    return wins


@pytest.mark.parametrize(
    ("sender", "asker"),
    [((KEYS[0],), (KEYS[1],)), ((KEYS[0], "salt"), (KEYS[0], "pepper")), ((KEYS[0], "salt"), (KEYS[1], "salt"))],
    ids=["other key", "other salt", "same salt of another key"],
)
def test_time_and_usage_do_not_tell_what_another_namespace_has_sent(client, sender, asker):
    wins = quicker(client, random.Random(7), sender, asker)
    assert share_of_luck(wins, PAIRS) > 1e-4, f"{wins} of {PAIRS}"


def test_the_measurement_sees_what_there_is_to_see(client):
    wins = quicker(client, random.Random(8), (KEYS[0],), (KEYS[0],))
    assert share_of_luck(wins, PAIRS) < 1e-9, f"{wins} of {PAIRS}"
