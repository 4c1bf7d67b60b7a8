"""System prompts as an operator handles them and as tenants meet them: HTTP, the command line, keys and namespaces."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import httpx
import psutil
import pytest
from fastapi import Depends, FastAPI

from vllm.entrypoints.cli.main import main
from vllm.entrypoints.http.errors import ApiError, handle_exception
from vllm.entrypoints.http.middleware import AdminGuard

KEYS, ADMIN = ("key-of-a", "key-of-b"), "key-of-the-operator"
PORTER = "You are the night porter of a small hotel by the sea. Answer politely, in at most two sentences."
HARBOUR = "You are the harbour master. You know every ship, and you say where she is bound in one short sentence."


@pytest.fixture(scope="module")
def server(server_factory, tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "porter.txt").write_text(PORTER + "\n")
    body = {"messages": [{"role": "system", "content": HARBOUR}], "name": "harbour", "ttl": 3600, "pin": "soft"}
    (folder / "harbour.json").write_text(json.dumps(body))
    files = [arg for name in ("porter.txt", "harbour.json") for arg in ("--system-prompt-file", str(folder / name))]
    flags = ("--dtype", "float32", "--max-model-len", "2048", "--num-gpu-blocks-override", "400")
    limits = ("--system-prompt-cache-tokens", "3200", "--system-prompt-min-tokens", "12")
    keys = ("--api-key", *KEYS, "--admin-api-key", ADMIN, "--engine-restarts", "1")
    # A test looks for the engine by its command line.
    options = [*flags, *limits, *files, *keys]
    return server_factory("--model", str(tiny_model_dir), *options, api_key=KEYS[0], cold=True)


@pytest.fixture
def admin(server):
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.Client(verify=False, base_url=server.url, headers=headers, timeout=120) as client:
        yield client


def chat(server, system, user, key=KEYS[0], **options):
    messages = [{"role": "system", "content": system}] if system else []
    body = {"messages": [*messages, {"role": "user", "content": user}], "max_tokens": 2, "temperature": 0, **options}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]


def cached(usage):
    return usage["prompt_tokens_details"]["cached_tokens"]


def named(admin, name):
    (found,) = [p for p in admin.get("/v1/system_prompts").json()["data"] if p["name"] == name]
    return found


def test_files_are_pinned_before_the_server_answers(server, admin):
    porter, harbour = named(admin, "porter"), named(admin, "harbour")
    assert (porter["source"], porter["pin"], porter["state"], porter["ttl"]) == ("preload", "hard", "pinned", None)
    assert (harbour["source"], harbour["pin"], harbour["ttl"]) == ("preload", "soft", 3600)
    assert porter["num_bytes"] > 0 and porter["hits"] == 0
    assert cached(chat(server, PORTER, "Is there a room?")) == porter["num_tokens"]
    after = named(admin, "porter")
    assert (after["hits"], after["tokens_saved"]) == (1, porter["num_tokens"])
    assert after["last_used"] > porter["last_used"]


@pytest.mark.parametrize("key", [None, KEYS[0], "wrong", ADMIN + "x"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("POST", ""), ("PATCH", ""), ("GET", "?explain=1"), ("GET", "/x"), ("PATCH", "/x"), ("DELETE", "/x")],
)
def test_only_the_operator_gets_at_the_pool(server, key, method, path):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = httpx.request(method, f"{server.url}/v1/system_prompts{path}", headers=headers, json={})
    assert answer.status_code == 401
    assert "sp-" not in answer.text


def test_the_operators_key_opens_the_other_routes_too(admin):
    assert admin.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("127.8.9.1", 200), ("::1", 200), ("::ffff:127.0.0.1", 200), ("10.0.0.7", 403), ("::", 403),
     ("::ffff:10.0.0.7", 403), ("localhost.example.com", 403), ("", 403)],
)  # fmt: skip
def test_without_an_admin_key_only_this_machine_is_let_in(host, status):
    assert ask_without_admin_key(host, {"Host": "localhost"}) == status


@pytest.mark.parametrize(
    "header",
    [{"Origin": "http://elsewhere"}, {"Origin": "null"}, {"Forwarded": "for=::1"}, {"X-Forwarded-For": "127.0.0.1"},
     {"X-Forwarded-Proto": "https"}, {"X-Real-IP": "127.0.0.1"}, {"Via": "1.1 proxy"}, {"Sec-Fetch-Site": "cross-site"},
     {"Host": "pages.example.com"}, {"Host": "pages.example.com:8000"}],
    ids=str,
)  # fmt: skip
def test_without_an_admin_key_neither_proxies_nor_web_pages_are_let_in(header):
    assert ask_without_admin_key("127.0.0.1", header) == 403


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "127.8.9.1:80", "box", "me.localhost:80"]
)
def test_names_of_this_machine_are_no_web_pages(host):
    assert ask_without_admin_key("127.0.0.1", {"Host": host, "User-Agent": "curl", "Accept": "*/*"}) == 200


def ask_without_admin_key(client_host, headers):
    app = FastAPI()
    app.add_exception_handler(ApiError, handle_exception)

    @app.get("/x", dependencies=[Depends(AdminGuard(None))])
    def show():
        return {}

    async def ask():
        transport = httpx.ASGITransport(app=app, client=(client_host, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/x", headers=headers)

    return asyncio.run(ask()).status_code


def test_the_same_tokens_are_the_same_prompt(admin):
    body = {"prompt_token_ids": list(range(1000, 1040)), "name": "ids"}
    first = admin.post("/v1/system_prompts", json=body).json()
    again = admin.post("/v1/system_prompts", json=body | {"name": "renamed", "pin": "soft"}).json()
    assert (first["id"], first["pin"], first["num_tokens"]) == (again["id"], "hard", 40)
    assert (again["name"], again["pin"]) == ("renamed", "soft")
    child = admin.post("/v1/system_prompts", json={"prompt_token_ids": list(range(1000, 1080))}).json()
    assert (child["parent"], child["num_blocks"]) == (first["id"], 3), "its own forty tokens only"
    held = admin.delete(f"/v1/system_prompts/{first['id']}").json()
    assert (held["deleted"], held["state"], held["children"]) == (False, "removing", 1)
    assert "pinned prompts that continue it (1)" in held["message"]
    assert admin.delete(f"/v1/system_prompts/{child['id']}").json()["deleted"]
    assert admin.get(f"/v1/system_prompts/{first['id']}").status_code == 404


def test_name_and_ttl_can_be_changed(admin):
    made = admin.post("/v1/system_prompts", json={"prompt": "Once upon a time there was a lighthouse " * 4}).json()
    path = f"/v1/system_prompts/{made['id']}"
    changed = admin.patch(path, json={"ttl": 60, "name": "tale"}).json()
    assert changed["name"] == "tale"
    assert changed["expires"] == pytest.approx(time.time() + 60, abs=30)
    assert admin.patch(path, json={"ttl": None}).json()["expires"] is None
    assert admin.get(path).json()["name"] == "tale", "what is not given stays"
    for wrong in ({}, {"ttl": -1}, {"name": ""}, {"ttl": "soon"}):
        assert admin.patch(path, json=wrong).status_code == 400
    admin.patch(path, json={"ttl": 0.2})
    deadline = time.monotonic() + 20
    while admin.get(path).status_code == 200:
        assert time.monotonic() < deadline, "its ttl has run out"
        time.sleep(0.1)
    assert admin.patch(path, json={"ttl": 5}).status_code == 404


def test_release_waits_for_readers_and_says_so(server, admin):
    system = "Tell long stories about the sea and never stop before the reader has fallen asleep."
    messages = [{"role": "system", "content": system}]
    made = admin.post("/v1/system_prompts", json={"messages": messages}).json()
    path = f"/v1/system_prompts/{made['id']}"
    body = {"messages": [*messages, {"role": "user", "content": "Go on"}], "max_tokens": 1900, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers, timeout=120) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        answer = admin.delete(path).json()
        assert (answer["deleted"], answer["state"], answer["readers"]) == (False, "removing", 1)
        assert answer["message"].startswith("Deferred until it is held no more by requests that read it (1)")
        assert admin.get(path).json()["state"] == "removing"
    deadline = time.monotonic() + 20
    while admin.get(path).status_code == 200:
        assert time.monotonic() < deadline, "its reader has gone"
        time.sleep(0.1)


def explain(admin, **body):
    answer = admin.post("/v1/system_prompts", params={"explain": 1}, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_explanations(admin):
    user = {"role": "user", "content": "Is there a room?"}
    before = admin.get("/v1/system_prompts").json()["pool"]
    porter = named(admin, "porter")

    hit = explain(admin, messages=[{"role": "system", "content": PORTER}, user])
    assert (hit["outcome"], hit["id"], hit["pinned_tokens"]) == ("hit", porter["id"], porter["num_tokens"])
    assert hit["nearest"] is None and hit["system_tokens"] == porter["num_tokens"] < hit["prompt_tokens"]

    miss = explain(admin, messages=[{"role": "system", "content": PORTER.replace("hotel", "inn")}, user])
    assert miss["outcome"] == "probation" and miss["id"] != porter["id"]
    nearest = miss["nearest"]
    assert nearest["id"] == porter["id"] and nearest["before"].endswith("of a small")
    assert (nearest["pinned_token"]["text"], nearest["request_token"]["text"]) == (" hotel", " inn")
    assert f"leaves the pinned prompt {porter['id']}" in miss["reason"]

    short = explain(admin, messages=[{"role": "system", "content": "Hi"}, user])
    assert short["outcome"] == "too_short" and "--system-prompt-min-tokens" in short["reason"]

    large = explain(admin, messages=[{"role": "system", "content": "oak and ash " * 430}, user])
    assert large["outcome"] == "probation"
    admin.patch("/v1/system_prompts", json={"budget_tokens": 640}).raise_for_status()
    large = explain(admin, messages=[{"role": "system", "content": "oak and ash " * 430}, user])
    assert large["outcome"] == "over_budget" and "of the pool's 640 tokens are taken" in large["reason"]
    assert admin.patch("/v1/system_prompts", json={"budget_tokens": 16}).status_code == 400
    assert admin.patch("/v1/system_prompts", json={"budget_tokens": 3200}).json() == {"budget_tokens": 3200}

    assert explain(admin, prompt="Hello")["outcome"] is None
    assert explain(admin, messages=[user])["outcome"] is None
    chat = {"messages": [{"role": "system", "content": PORTER}, user]}
    for fields in ({"prompt_logprobs": 0}, {"echo": True, "logprobs": True}):
        assert explain(admin, **chat, **fields)["outcome"] == "prompt_logprobs"
        assert explain(admin, **chat, **fields, stream=True)["outcome"] == "hit"
    ids = admin.post("/tokenize", json=chat).json()["tokens"]
    for fields, outcome in (({}, "hit"), ({"logprobs": 0}, "hit"), ({"logprobs": 0, "echo": True}, None)):
        assert explain(admin, prompt=ids, **fields, stream=True)["outcome"] == outcome
    for wrong in ({}, {"messages": [user], "prompt": "x"}, {"prompt": 5}):
        assert admin.post("/v1/system_prompts?explain=1", json=wrong).status_code == 400
    after = admin.get("/v1/system_prompts").json()["pool"]
    assert after == before, "explaining changes nothing"


def test_bodies_of_all_apis_are_explained_as_their_routes_read_them(server, admin):
    user = {"role": "user", "content": "Is there a room?"}
    marked = {
        "role": "user",
        "content": [{"type": "text", "text": "Map. " * 40, "cache_control": {"type": "ephemeral"}}],
    }
    chat_body = explain(admin, messages=[{"role": "system", "content": PORTER}, user])
    assert explain(admin, system=PORTER, messages=[user], max_tokens=3) == chat_body
    assert explain(admin, instructions=PORTER, input=user["content"]) == chat_body
    explained = explain(admin, system=PORTER, messages=[marked, user], max_tokens=3)
    assert explained["outcome"] == "probation", "the mark reaches further than the pinned prompt"
    tool = {"name": "book", "description": "Books a room.", "input_schema": {"type": "object"}}
    body = {"messages": [user], "tools": [tool], "tool_choice": {"type": "none"}}
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    count = httpx.post(f"{server.url}/v1/messages/count_tokens", json=body, headers=headers, timeout=60)
    assert explain(admin, **body)["prompt_tokens"] == count.json()["input_tokens"]
    body = {"instructions": PORTER, "input": "word " * 5000, "max_output_tokens": 48}
    assert admin.post("/v1/system_prompts?explain=1", json=body).status_code == 400, "the route refuses it too"
    assert explain(admin, **body, truncation="auto")["prompt_tokens"] == 2000
    for wrong in (
        {"messages": [user], "input": "x"},
        {"system": 5, "messages": [user]},
        {"instructions": PORTER, "input": 5},
    ):
        assert admin.post("/v1/system_prompts?explain=1", json=wrong).status_code == 400


def test_what_runs_unpinned_is_listed(server, admin):
    usage = [chat(server, "Be brief", "Hello?") for _ in range(3)]
    listed = admin.get("/v1/system_prompts").json()
    (refused,) = [r for r in listed["refused"] if r["requests"] == 3]
    assert refused["outcome"] == "too_short" and refused["num_tokens"] < usage[0]["prompt_tokens"]
    assert listed["pool"]["outcomes"]["too_short"] >= 3
    assert server.log_path.read_text().count(f"{refused['id']} runs unpinned: too_short") == 1


def test_a_date_in_system_prompts_is_pointed_out(server, admin):
    for day in ("Monday", "Thursday", "Friday", "Sunday"):
        chat(server, f"Today is {day}. " + HARBOUR + " You like tea, and you never speak of the weather.", "Hello")
    (warning,) = admin.get("/v1/system_prompts").json()["warnings"]
    assert warning["num_prompts"] == 4 and len(warning["examples"]) == 3
    assert {"Monday", "Thursday"} <= {e.strip(" .") for e in warning["examples"]}
    assert "Today is" in warning["message"]
    assert server.log_path.read_text().count("system prompts differ only at token") == 1, "once per template"


def test_a_tenant_learns_nothing_of_anothers_suffixes(server):
    question = "I met a traveller from an antique land who said " * 12
    own = [chat(server, PORTER, question, KEYS[0]) for _ in range(2)]
    pinned = cached(own[0])
    assert 0 < pinned < cached(own[1]), "the tenant's own suffix is found again"
    sent, unsent = chat(server, PORTER, question, KEYS[1]), chat(server, PORTER, "Never sent. " + question, KEYS[1])
    assert cached(sent) == cached(unsent) == pinned, "the system prompt is shared, what follows it is not"
    salted = [chat(server, PORTER, question, KEYS[0], cache_salt=salt) for salt in ("x", "y", "x")]
    assert [cached(u) for u in salted[:2]] == [pinned] * 2 and cached(salted[2]) == cached(own[1])
    other = chat(server, PORTER, question, KEYS[1], cache_salt="x")
    assert cached(other) == pinned, "a salt is the tenant's own"


@pytest.mark.parametrize("fields", [{"prompt_cache_key": "mine", "prompt_cache_retention": "24h"},
                                    {"prompt_cache_retention": "in_memory"}])  # fmt: skip
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}),
        ("completions", {"prompt": "Hi", "max_tokens": 1}),
        ("responses", {"input": "Hi", "max_output_tokens": 1}),
    ],
)
def test_how_clients_of_openai_ask_for_caching_is_accepted(server, path, body, fields):
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    answer = httpx.post(f"{server.url}/v1/{path}", json=body | fields, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    if path == "responses":
        assert {key: answer.json()[key] for key in fields} == fields


def test_long_raw_prompts_share_their_head_within_a_tenant(server, admin):
    def complete(tail, key):
        body = {"prompt": [*range(2000, 3100), *tail], "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120).json()["usage"]

    complete([5, 6, 7], KEYS[0])
    complete([8, 9], KEYS[0])
    (head,) = [p for p in admin.get("/v1/system_prompts").json()["data"] if p["source"] == "shared_prefix"]
    assert head["num_tokens"] == 1088
    complete([4] * 40, KEYS[0])
    (head,) = [p for p in admin.get("/v1/system_prompts").json()["data"] if p["source"] == "shared_prefix"]
    assert head["hits"] == 1
    assert cached(complete([8, 9], KEYS[1])) == 0, "another tenant does not even learn that it is there"
    admin.delete(f"/v1/system_prompts/{head['id']}")


# The command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm_prompts(server, capsys):
    def run(*argv, key=ADMIN):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["prompts", *argv, "--url", server.url, "--api-key", key])
        return (end.value.code, *capsys.readouterr())

    return run


def test_prompts_from_the_shell(vllm_prompts, tmp_path, monkeypatch):
    code, out, _ = vllm_prompts("list")
    assert code == 0
    head, *rows = [line for line in out.splitlines() if not line.startswith("warning")]
    assert head.split()[:3] == ["id", "name", "state"]
    assert any("porter" in row and "preload" in row and "pinned" in row for row in rows)

    file = tmp_path / "clerk.txt"
    file.write_text("You are the clerk of a post office in the mountains, and you love stamps.\n")
    code, out, _ = vllm_prompts("add", str(file), "--ttl", "60", "--json")
    made = json.loads(out)
    assert code == 0 and made["name"] == "clerk" and made["ttl"] == 60 and made["state"] == "pinned"
    monkeypatch.setattr(sys, "stdin", file.open())
    code, out, _ = vllm_prompts("add", "-", "--name", "clerk", "--pin", "soft")
    assert code == 0 and made["id"] in out and "soft" in out and "never" in out

    code, out, _ = vllm_prompts("stats")
    assert code == 0 and "budget tokens" in out and "requests: hit" in out
    assert "pool" in json.loads(vllm_prompts("stats", "--json")[1])
    code, out, _ = vllm_prompts("remove", "clerk")
    assert (code, out) == (0, f"{made['id']}: Released.\n")
    assert made["id"] not in [p["id"] for p in json.loads(vllm_prompts("list", "--json")[1])]


def test_errors_from_the_shell_are_one_line(vllm_prompts, tmp_path):
    for argv, key, text in (
        (("list",), "wrong", "The server answers 401"),
        (("remove", "sp-0"), ADMIN, "There is no system prompt 'sp-0'"),
        (("add", str(tmp_path / "none.txt")), ADMIN, "cannot be read"),
    ):
        code, _, err = vllm_prompts(*argv, key=key)
        assert code == 1 and err.startswith("error: ") and text in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[1]", "must be a JSON object"),
        ("x.json", b'{"pin": "firm"}', "pin must be"),
        ("x.txt", b"\xff", "UTF-8"),
    ],
)
def test_a_wrong_file_stops_the_start(tmp_path, name, content, message):
    from vllm.entrypoints.openai.system_prompt_files import read_system_prompt_file
    from vllm.exceptions import StartupError

    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match=message):
        read_system_prompt_file(tmp_path / name)
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        read_system_prompt_file(tmp_path / "missing.txt")


def test_an_engine_that_follows_a_dead_one_has_what_operators_pinned(server, admin):
    """Last of the tests over HTTP: what requests pinned is gone after it."""
    kept, ended = named(admin, "porter"), named(admin, "harbour")
    (engine,) = [p for p in psutil.Process(server.process.pid).children() if "core_process" in " ".join(p.cmdline())]
    engine.kill()
    deadline = time.monotonic() + 60
    while True:
        answer = admin.get("/v1/system_prompts")
        names = [p["name"] for p in answer.json()["data"]] if answer.status_code == 200 else []
        if "porter" in names:
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert named(admin, "porter")["id"] == kept["id"]
    assert cached(chat(server, PORTER, "Is there still a room?")) == kept["num_tokens"]
    assert ended["name"] not in names, "a pin with an end, or a soft one, is not given back"
