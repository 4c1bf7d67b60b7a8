"""A checkpoint that also reads images, served over HTTP: its language model answers, images are refused."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import ServerFactory
from tests.model_executor.test_text_parts import make_reference
from vllm.transformers_utils.tokenizer import load_tokenizer

# Longer than the window of 9 tokens.
SYSTEM = "You answer in one word. You never explain. You are kind, and you count from one to ten when asked."
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello, who are you?"}]


@pytest.fixture(scope="module")
def reference(default_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """Gemma 4's shape (layers differ in their heads) with an image tower, the default model's tokenizer beside it."""
    folder = tmp_path_factory.mktemp("gemma4")
    tokenizer = load_tokenizer(default_model_path)
    model = make_reference("gemma4", {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512})
    model.save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    return model, folder


@pytest.mark.nightly
def test_the_language_model_answers_and_images_are_refused(
    reference: tuple[PreTrainedModel, Path], server_factory: ServerFactory
) -> None:
    model, folder = reference
    flags = ["--dtype", "float32", "--language-model-only", "--max-num-batched-tokens", "16", "--max-num-seqs", "8"]
    server = server_factory("--model", str(folder), *flags, "--num-gpu-blocks-override", "128")
    prompt = load_tokenizer(str(folder)).hf.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        for _ in range(12):
            ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)), dim=1)
    want = ids[0, len(prompt) :].tolist()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        for cached in (False, True, True):
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["token_ids"] == want
            details = answer["usage"]["prompt_tokens_details"]
            assert bool(details["cached_tokens"]) is cached
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [image]}]})
        assert answer.status_code == 400
        assert "only text parts" in answer.json()["error"]["message"]
