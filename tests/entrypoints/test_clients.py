"""Client libraries that people have on top of the official SDKs, against the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

SYSTEM = "You are the guide of a cave, who answers in one short sentence."
QUESTION = "How deep is the cave?"

# Run with litellm ahead of everything else on the path, since it needs another release of the OpenAI SDK.
LITELLM_SCRIPT = """
import json, sys
import litellm
url, model = sys.argv[1:3]
asked = {"messages": json.loads(sys.argv[3]), "max_tokens": 6, "temperature": 0, "api_key": "EMPTY"}
openai = {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", **asked}
whole = litellm.completion(**openai)
parts = list(litellm.completion(**openai, stream=True))
anthropic = litellm.completion(model=f"anthropic/{model}", api_base=url, **asked)
too_long = [{"role": "user", "content": "cave " * 3000}]
try:
    error = litellm.completion(**openai | {"messages": too_long})
except litellm.exceptions.BadRequestError as exc:
    error = exc
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "streamed": "".join(part.choices[0].delta.content or "" for part in parts),
    "anthropic": anthropic.choices[0].message.content,
    "error": type(error).__name__,
    "cached": [answer.usage.prompt_tokens_details.cached_tokens for answer in (whole, anthropic)],
}))
"""


# A tool is demanded, so that the model, whatever it is, calls it.
AGENTS_SCRIPT = """
import asyncio, json, sys
import agents, openai
url, model = sys.argv[1:3]
agents.set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="EMPTY")

@agents.function_tool
def depth(cave: str) -> str:
    \"\"\"How deep a cave is.\"\"\"
    return "ninety metres"

async def main():
    seen = []
    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        agent = agents.Agent(
            name="Guide", instructions="Be brief.", model=kind(model=model, openai_client=client), tools=[depth],
            model_settings=agents.ModelSettings(tool_choice="required", max_tokens=400, temperature=0),
            tool_use_behavior="stop_on_first_tool",
        )
        seen.append((await agents.Runner.run(agent, "How deep is it?")).final_output)
        run = agents.Runner.run_streamed(agent, "How deep is it?")
        kinds = {event.type async for event in run.stream_events()}
        seen.append(run.final_output if "raw_response_event" in kinds else kinds)
    print(json.dumps(seen))

asyncio.run(main())
"""


@pytest.mark.nightly
def test_openai_agents_calls_a_tool_over_both_apis(server, pip_folder):
    folder = pip_folder("openai-agents", timeout=600)
    done = subprocess.run(
        [sys.executable, "-c", AGENTS_SCRIPT, server.url, server.model],
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["ninety metres"] * 4


@pytest.fixture(scope="session")
def litellm_dir(pip_folder: Callable[..., Path]) -> Path:
    return pip_folder("litellm", timeout=600)


def langchain_model(server, **fields) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="EMPTY", model=server.model, temperature=0, max_retries=0, **fields
    )


def test_langchain_chats(server):
    model = langchain_model(server, max_tokens=6, stream_usage=True)
    messages = [SystemMessage(SYSTEM), HumanMessage(QUESTION)]
    answer = model.invoke(messages)
    assert answer.content
    chunks = list(model.stream(messages))
    assert "".join(chunk.text for chunk in chunks) == answer.content
    seen = chunks[0]
    for chunk in chunks[1:]:
        seen += chunk
    assert seen.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert seen.usage_metadata["input_token_details"]["cache_read"] > 0


def test_langchain_uses_the_responses_api(server):
    model = langchain_model(server, use_responses_api=True, max_tokens=6)
    first = model.invoke([SystemMessage(SYSTEM), HumanMessage(QUESTION)])
    assert first.text
    going_on = model.invoke([HumanMessage("And how wide?")], previous_response_id=first.response_metadata["id"])
    assert going_on.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]
    chunks = list(model.stream([SystemMessage(SYSTEM), HumanMessage(QUESTION)]))
    assert "".join(chunk.text for chunk in chunks) == first.text


@pytest.mark.nightly
def test_litellm_speaks_both_dialects(server, litellm_dir):
    messages = [{"role": "system", "content": SYSTEM * 8}, {"role": "user", "content": QUESTION}]
    done = subprocess.run(
        [sys.executable, "-c", LITELLM_SCRIPT, server.url, server.model, json.dumps(messages)],
        env={"PYTHONPATH": str(litellm_dir), "PATH": "/usr/bin:/bin", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["whole"] == seen["streamed"] == seen["anthropic"]
    assert seen["cached"][1] > 0
    assert seen["error"] == "ContextWindowExceededError"
