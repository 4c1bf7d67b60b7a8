"""The default model's greedy tokens are those of transformers on the same weights, however the requests are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.helpers import Request, assert_nothing_held, finish, greedy, make_engine, run, tokens
from vllm.engine.llm_engine import LLMEngine

NUM_TOKENS = 32
SHORT = 16
ALONE = 6

TEXT = """\
The lighthouse keeper counted the ships that passed before the storm, and wrote each name in a book with a blue cover.
Nobody had asked him to do it. In spring the harbour filled with boats from the south, carrying oranges, salt and news
of places he would never see. He traded lamp oil for stories. One evening a woman came up the stairs and asked for the
page of the twelfth of March, eleven years ago. He found it at once, because he remembered every page; on it stood
nine names, and the last one was crossed out. She read it twice, closed the book and looked at the sea for a long
time. Then she told him what had happened to the ship, why it had turned back, and who had paid for the lamp that did
not burn that night.
"""

SYSTEM = (
    "You are a helpful assistant. Answer in one sentence.",
    "You work for the municipal library. Opening hours: Monday to Friday from 9 to 19, Saturday from 10 to 14. Loans "
    "last four weeks and may be extended twice. Reminders cost one euro for each item and week. Answer politely, and "
    "never invent a title that the library does not hold.",
    "You write short summaries of stories. Keep the names, the places and the order of events. Here is a story that "
    "you know well:\n" + TEXT,
)
QUESTIONS = (
    "Hello!",
    "What is the capital of Portugal?",
    "How long may I keep a book, and what does it cost if I forget it?",
    "Write a list of three things that a keeper of a lighthouse needs.",
)
PLAIN_LENGTHS = (5, 15, 16, 17, 32, 90, 330)
NUM_CHATS = 6


@pytest.fixture(scope="module")
def engine(default_model_path: str) -> Iterator[LLMEngine]:
    engine = make_engine(default_model_path, max_model_len=1024)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def requests(engine: LLMEngine) -> list[Request]:
    """13 prompts of 5 to 330 tokens; 6 of them start with one of three system prompts."""
    text = engine.tokenizer.encode(TEXT * 6)
    plain = [Request(text[7 * i : 7 * i + n]) for i, n in enumerate(PLAIN_LENGTHS)]
    chats = []
    for i in range(NUM_CHATS):
        messages = [
            {"role": "system", "content": SYSTEM[i % 3]},
            {"role": "user", "content": QUESTIONS[i // 3]},
        ]
        chat = engine.renderer.render(messages)
        assert chat.num_system_tokens is not None
        chats.append(Request(chat.prompt_token_ids, chat.num_system_tokens))
    return [r for pair in zip(plain, chats, strict=False) for r in pair] + plain[len(chats) :]


@pytest.fixture(scope="module")
def expected(engine: LLMEngine, requests: list[Request]) -> list[list[int]]:
    """All at once, with pinned system prompts."""
    outputs = tokens(run(engine, requests, greedy(NUM_TOKENS)))
    assert engine.core.pool.num_prefills == 3
    return outputs


def cut(outputs: list[list[int]], count: int) -> list[list[int]]:
    return [output[:count] for output in outputs]


def test_transformers_gives_the_same_tokens(
    requests: list[Request], expected: list[list[int]], hf_model_dir: Path
) -> None:
    # One pass over prompt and output: the output is greedy if every token is the argmax after what precedes it.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_model_dir, dtype=torch.float32)
    for i, (request, output) in enumerate(zip(requests, expected, strict=True)):
        assert len(output) == NUM_TOKENS
        ids = torch.tensor([request.token_ids + output[:-1]])
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=NUM_TOKENS, use_cache=False).logits[0]
        best = logits.argmax(dim=-1).tolist()
        assert output == best, f"request {i} ({len(request.token_ids)} tokens)"


def test_one_by_one(engine: LLMEngine, requests: list[Request], expected: list[list[int]]) -> None:
    engine.reset_prefix_cache()
    alone = [tokens(run(engine, [request], greedy(ALONE)))[0] for request in requests]
    assert alone == cut(expected, ALONE)
    assert engine.core.pool.num_prefills == 3
    assert_nothing_held(engine)


@pytest.mark.nightly
def test_safetensors_hold_the_same_weights(default_model_path: str, hf_model_dir: Path) -> None:
    # The CPU kernels would take the weights over.
    engine, other = (
        make_engine(path, num_gpu_blocks_override=32, attention_backend="TORCH")
        for path in (default_model_path, hf_model_dir)
    )
    ours, theirs = (e.core.executor._worker.model.state_dict() for e in (engine, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert other.vllm_config.model.load_format == "safetensors"
    assert other.vllm_config.model.eos_token_ids == engine.vllm_config.model.eos_token_ids
    engine.shutdown()
    other.shutdown()


@pytest.mark.nightly
def test_without_pinned_prompts(default_model_path: str, requests: list[Request], expected: list[list[int]]) -> None:
    engine = make_engine(default_model_path, max_model_len=1024, system_prompt_cache="off")
    assert tokens(run(engine, requests, greedy(NUM_TOKENS))) == expected
    assert engine.core.pool.num_prefills == 0
    engine.shutdown()


@pytest.mark.nightly
def test_prompts_cut_at_odd_places(default_model_path: str, requests: list[Request], expected: list[list[int]]) -> None:
    engine = make_engine(default_model_path, max_model_len=512, max_num_batched_tokens=37, max_num_seqs=13)
    assert tokens(run(engine, requests, greedy(SHORT))) == cut(expected, SHORT)
    engine.shutdown()


@pytest.mark.nightly
def test_preempted_requests(default_model_path: str, requests: list[Request], expected: list[list[int]]) -> None:
    # 1,056 tokens in all, of which the pinned prompts take 480; the requests need almost twice what is left.
    engine = make_engine(default_model_path, max_model_len=512, num_gpu_blocks_override=66)
    for i, request in enumerate(requests):
        engine.add_request(f"run-{i}", request.token_ids, greedy(SHORT), num_system_tokens=request.num_system_tokens)
    outputs = finish(engine)
    assert tokens(outputs[f"run-{i}"] for i in range(len(requests))) == cut(expected, SHORT)
    assert engine.core.scheduler.num_preemptions > 0
    assert engine.core.pool.num_prefills == 3
    assert_nothing_held(engine)
    engine.shutdown()
