"""A server that was restarted answers from the snapshots of the one before, as a client sees it."""

import json
import time
import urllib.request

import pytest

from tests.entrypoints.test_pinning_over_http import ARGS, body, cached, words


def call(server, method, path, data=None):
    request = urllib.request.Request(
        server.url + path,
        None if data is None else json.dumps(data).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read().decode()
    return text if path == "/metrics" else json.loads(text)


def chat(server, system, user):
    return call(server, "POST", "/v1/chat/completions", body(system, user, max_tokens=16))


def metric(server, name, *labels):
    lines = (line for line in call(server, "GET", "/metrics").splitlines() if line.startswith(f"vllm:{name}{{"))
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in labels))


def wait_for(server, count, *labels):
    deadline = time.monotonic() + 120
    while metric(server, "system_prompt_snapshot_total", *labels) < count:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def start(server_factory, tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return lambda *flags: server_factory(
        "--model", str(tiny_model_dir), *ARGS, "--system-prompt-cache-dir", str(folder), *flags
    )


def test_every_pin_survives_a_restart(start):
    hard, automatic, removed = words("hard", 900), words("automatic", 700), words("removed", 100)
    before = start()
    pinned = [
        call(before, "POST", "/v1/system_prompts", {"messages": [{"role": "system", "content": text}], "name": name})
        for text, name in ((hard, "Rules"), (removed, "Old rules"))
    ]
    first = {system: chat(before, system, "Hello") for system in (hard, automatic)}
    size = {hard: pinned[0]["num_tokens"], automatic: cached(chat(before, automatic, "Again"))}
    assert cached(first[hard]) == size[hard] > 900 and size[automatic] > 700
    wait_for(before, 3, 'op="save"', 'outcome="ok"')
    call(before, "DELETE", f"/v1/system_prompts/{pinned[1]['id']}")
    wait_for(before, 1, 'op="delete"', 'outcome="ok"')
    before.stop()

    after = start()
    # Healthy now, so it is there now.
    found = {p["id"]: p for p in call(after, "GET", "/v1/system_prompts")["data"]}
    assert found[pinned[0]["id"]]["state"] == "pinned" and found[pinned[0]["id"]]["name"] == "Rules"
    assert pinned[1]["id"] not in found
    for system in (hard, automatic):
        answer = chat(after, system, "Hello")
        assert cached(answer) == size[system], "of the very first request"
        assert answer["choices"][0]["message"] == first[system]["choices"][0]["message"]
    wait_for(after, 2, 'op="load"', 'outcome="ok"')
    assert metric(after, "system_prompt_prefills_total") == 0
    assert metric(after, "system_prompt_snapshot_total") == 2
    after.stop()
