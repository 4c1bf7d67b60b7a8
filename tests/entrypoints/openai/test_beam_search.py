"""Beam search and `best_of` over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.test_beam_search import naive_search

from .test_chat import stream

PROMPT = "The capital of France is"
MESSAGES = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Name a colour."}]


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def post(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    return post(client, "/v1/completions", **{"prompt": PROMPT, "max_tokens": 5, **fields})


def test_beams_are_those_of_transformers_probabilities(client: httpx.Client, tiny_model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    @torch.inference_mode()
    def next_logprobs(tokens: list[int]) -> dict[int, float]:
        logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], -1)
        values, ids = logprobs.topk(20)
        return dict(zip(ids.tolist(), values.tolist(), strict=True))

    prompt = post(client, "/tokenize", prompt=PROMPT)["tokens"]
    expected = naive_search(next_logprobs, prompt, 3, 5, set(), 1.0)
    answer = complete(
        client, use_beam_search=True, n=3, ignore_eos=True, logprobs=2, return_token_ids=True, temperature=0
    )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice, (_, total, tokens) in zip(answer["choices"], expected, strict=True):
        assert choice["token_ids"] == tokens[len(prompt) :]
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(total, abs=1e-3)
        assert choice["text"] == "".join(choice["logprobs"]["tokens"])
        assert all(2 <= len(top) <= 3 for top in choice["logprobs"]["top_logprobs"])
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 15


def test_prompts_of_a_batch_are_searched_each_for_itself(client: httpx.Client):
    fields: dict[str, Any] = {"use_beam_search": True, "n": 2, "ignore_eos": True}
    both = complete(client, prompt=[PROMPT, "One"], echo=True, **fields)["choices"]
    alone = [complete(client, prompt=p, echo=True, **fields)["choices"] for p in (PROMPT, "One")]
    assert [choice["text"] for choice in both] == [choice["text"] for choices in alone for choice in choices]


def test_best_of_is_the_width_of_the_beam_and_n_are_returned(client: httpx.Client):
    fields: dict[str, Any] = {"prompt": [PROMPT, "One"], "use_beam_search": True, "ignore_eos": True, "echo": True}
    wide = complete(client, **fields, n=3)["choices"]
    best = complete(client, **fields, n=2, best_of=3)["choices"]
    assert [choice["text"] for choice in best] == [wide[i]["text"] for i in (0, 1, 3, 4)]
    assert [choice["index"] for choice in best] == [0, 1, 2, 3]
    chat: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 4, "use_beam_search": True}
    wide = post(client, "/v1/chat/completions", **chat, n=3)["choices"]
    (choice,) = post(client, "/v1/chat/completions", **chat, best_of=3)["choices"]
    assert choice["message"] == wide[0]["message"]


def test_a_chat_is_searched_with_its_system_prompt_pinned(client: httpx.Client):
    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 6, "use_beam_search": True, "n": 2}
    first = post(client, "/v1/chat/completions", **fields)
    again = post(client, "/v1/chat/completions", **fields, logprobs=True, top_logprobs=5)
    assert len({choice["message"]["content"] for choice in first["choices"]}) == 2
    assert [choice["message"] for choice in again["choices"]] == [choice["message"] for choice in first["choices"]]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    # At this place, the tops of both beams come from the same distribution.
    tops = [choice["logprobs"]["content"][0]["top_logprobs"] for choice in again["choices"]]
    assert tops[0] == tops[1] and len(tops[0]) == 5


def test_an_end_token_shows_only_where_stop_strings_do(client: httpx.Client):
    fields: dict[str, Any] = {"use_beam_search": True, "n": 3, "return_token_ids": True, "ignore_eos": True}
    plain = complete(client, **fields)["choices"][0]["token_ids"]
    hidden = complete(client, **fields, stop_token_ids=[plain[2]])["choices"]
    shown = complete(client, **fields, stop_token_ids=[plain[2]], include_stop_str_in_output=True)["choices"]
    ended = [i for i, choice in enumerate(hidden) if choice["stop_reason"] == plain[2]]
    assert ended
    for i in ended:
        assert hidden[i]["token_ids"] + [plain[2]] == shown[i]["token_ids"]
        assert hidden[i]["text"] == shown[i]["text"]


def test_a_stop_string_is_cut_off(client: httpx.Client):
    fields: dict[str, Any] = {"use_beam_search": True, "n": 2, "max_tokens": 8, "ignore_eos": True}
    plain = complete(client, **fields)["choices"][0]["text"]
    stop = plain[len(plain) // 2 :][:3]
    choices = complete(client, **fields, stop=stop)["choices"]
    (cut,) = [choice["text"] for choice in choices if plain.startswith(choice["text"])]
    assert cut == plain[: plain.index(stop)]


def test_completions_refuse_to_stream_a_search_and_chats_tell_it_at_the_end(client: httpx.Client):
    body = {"prompt": PROMPT, "use_beam_search": True, "n": 2, "stream": True}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream"
    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 6, "use_beam_search": True, "n": 2}
    whole = post(client, "/v1/chat/completions", **fields)
    chunks = stream(client, "/v1/chat/completions", **fields)
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_search_refuses_stop_tokens_that_the_model_has_not(client: httpx.Client, streamed: bool):
    body = {"messages": MESSAGES, "use_beam_search": True, "stop_token_ids": [10_000_000], "stream": streamed}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "stop_token_ids"


def test_best_of_returns_those_with_the_highest_logprob_per_token(client: httpx.Client):
    fields: dict[str, Any] = {"seed": 7, "temperature": 1.5, "max_tokens": 6, "logprobs": 0}
    every = complete(client, **fields, n=5)["choices"]
    means = [(sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]), c["text"]) for c in every]
    best = [text for _, text in sorted(means, key=lambda entry: -entry[0])]
    assert len(set(best)) > 2
    answer = complete(client, **fields, n=2, best_of=5)
    assert [choice["text"] for choice in answer["choices"]] == best[:2]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)
    silent = complete(client, **fields | {"logprobs": None}, best_of=5)["choices"]
    assert [(choice["text"], choice["logprobs"]) for choice in silent] == [(best[0], None)]
    assert complete(client, **fields, n=2, best_of=2)["choices"] == complete(client, **fields, n=2)["choices"]


def test_a_chat_takes_the_best_of_several(client: httpx.Client):
    fields: dict[str, Any] = {"messages": MESSAGES, "seed": 7, "temperature": 1.5, "max_tokens": 6}
    every = post(client, "/v1/chat/completions", **fields, n=4, logprobs=True)["choices"]
    best = max(every, key=lambda c: sum(t["logprob"] for t in c["logprobs"]["content"]) / len(c["logprobs"]["content"]))
    (choice,) = post(client, "/v1/chat/completions", **fields, best_of=4)["choices"]
    assert choice["message"] == best["message"]
    assert (choice["index"], choice["logprobs"]) == (0, None)
