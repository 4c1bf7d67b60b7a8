"""The OpenAI SDKs that people have: the current one and the last before 1.0."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

MESSAGES = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Hello"}]

# Run with the old SDK ahead of the new one on the path; prints what it understood.
OLD_SDK_SCRIPT = """
import json, sys
import openai
url, model = sys.argv[1:3]
openai.api_base, openai.api_key = url + "/v1", "EMPTY"
messages = json.loads(sys.argv[3])
whole = openai.ChatCompletion.create(model=model, messages=messages, max_tokens=5, temperature=0)
parts = list(openai.ChatCompletion.create(model=model, messages=messages, max_tokens=5, temperature=0, stream=True))
text = openai.Completion.create(model=model, prompt="The sky is", max_tokens=3, logprobs=1)
try:
    openai.ChatCompletion.create(model=model, messages=[], max_tokens=5)
    error = None
except openai.error.InvalidRequestError as exc:
    error = [exc.http_status, str(exc)]
print(json.dumps({
    "version": openai.version.VERSION,
    "whole": whole.choices[0].message.content,
    "streamed": "".join(part.choices[0].delta.get("content", "") for part in parts),
    "usage": whole.usage.total_tokens,
    "completion": text.choices[0].text,
    "models": [model.id for model in openai.Model.list().data],
    "error": error,
}))
"""


@pytest.fixture
def sdk(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def old_sdk_dir(pip_folder: Callable[..., Path]) -> Path:
    return pip_folder("openai==0.28.1")


def test_chat(sdk, server):
    answer = sdk.chat.completions.create(model=server.model, messages=MESSAGES, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content is not None
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_streamed_chat(sdk, server):
    parts = sdk.chat.completions.create(
        model=server.model,
        messages=MESSAGES,
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(parts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 5


def test_completion_and_models(sdk, server):
    answer = sdk.completions.create(model=server.model, prompt=["a", "b"], max_tokens=2, logprobs=1)
    assert len(answer.choices) == 2
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens // 2
    assert server.model in [model.id for model in sdk.models.list()]
    assert sdk.models.retrieve(server.model).owned_by == "vllm"


def test_errors_are_the_sdks_own(sdk, server):
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model=server.model, messages=[], max_tokens=5)
    assert bad.value.param == "messages"
    assert "at least one" in bad.value.message
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="nobody", messages=MESSAGES)


@pytest.mark.nightly
def test_the_sdk_from_before_1_0(server, old_sdk_dir):
    done = subprocess.run(
        [sys.executable, "-c", OLD_SDK_SCRIPT, server.url, server.model, json.dumps(MESSAGES)],
        env={"PYTHONPATH": str(old_sdk_dir), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["version"] == "0.28.1"
    assert seen["whole"] == seen["streamed"]
    assert seen["usage"] > 0
    assert seen["completion"]
    assert seen["models"] == [server.model]
    assert seen["error"][0] == 400
    assert "at least one" in seen["error"][1]
