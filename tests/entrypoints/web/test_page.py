"""The page at `/`: its files and headers, who may read them, and what it may ask the operator's routes."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from pathlib import Path

import httpx
import pytest
from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry, Counter

from server_process import ServerProcess
from vllm.entrypoints.http.errors import ApiError, handle_exception
from vllm.entrypoints.http.middleware import AdminGuard, ApiKeyMiddleware
from vllm.entrypoints.web import history as history_module
from vllm.entrypoints.web.history import History
from vllm.entrypoints.web.routes import OPEN_PATHS, web_routes

STATIC = Path(history_module.__file__).parent / "static"


def app_with_page(history: History | None = None) -> FastAPI:
    app = FastAPI()
    app.include_router(web_routes(history or History(CollectorRegistry())))
    return app


def ask(app, path: str, headers: dict[str, str] | None = None, client: str = "127.0.0.1") -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(client, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as session:
            return await session.get(path, headers=headers)

    return asyncio.run(go())


@pytest.mark.parametrize("path", [path for path in OPEN_PATHS if path != "/web/history"])
def test_every_file_comes_with_its_type_and_a_strict_policy(path):
    response = ask(app_with_page(), path)
    assert response.status_code == 200 and response.content
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" == policy["connect-src"]
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    again = ask(app_with_page(), path, {"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304 and not again.content


def test_the_files_name_no_other_host_and_only_files_that_are_there():
    for file in STATIC.glob("*.*"):
        text = file.read_text()
        assert set(re.findall(r"https?://[^\"')\s]+", text)) <= {"http://www.w3.org/2000/svg"}, file
        assert " style=" not in text and "<script>" not in text, f"{file} breaks its own policy"
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert f"/web/{name}" in OPEN_PATHS, f"{file} imports {name}"
    page = (STATIC / "index.html").read_text()
    assert {f"/{name}" for name in re.findall(r'(?:src|href)="(web/[^"]+)"', page)} <= set(OPEN_PATHS)


def test_every_text_that_is_asked_for_is_there_in_both_languages():
    texts = (STATIC / "texts.js").read_text()
    entries = dict(re.findall(r'^  "?([\w-]+)"?: \[(.*?)\],?$', texts, re.MULTILINE | re.DOTALL))
    asked = {
        key
        for file in STATIC.glob("*.js")
        for key in re.findall(r'\bt\("([\w-]+)"', file.read_text())
        + re.findall(r'label\("[\w-]+", "([\w-]+)"', file.read_text())
    }
    assert asked and asked <= set(entries), asked - set(entries)
    for key, pair in entries.items():
        english, chinese = re.findall(r'"((?:[^"\\]|\\.)*)"', pair)
        places = [set(re.findall(r"\{(\w+)\}", text)) for text in (english, chinese)]
        assert places[1] <= places[0] and (places[0] == places[1] or places[0] == {"reason"}), key


def test_a_key_is_needed_for_the_api_but_not_for_the_page():
    app = ApiKeyMiddleware(app_with_page(), ["secret"], root_path="/llm", open_paths=OPEN_PATHS)
    assert ask(app, "/").status_code == 200
    assert ask(app, "/web/app.js").status_code == 200
    assert ask(app, "/web/../v1/models").status_code == 401
    assert ask(app, "/web/nothing.js").status_code == 401


OWN = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
PAGE = {**OWN, "Referer": "http://localhost:8000/"}


def ask_as_page(headers: dict[str, str], own_pages: bool = True, client: str = "127.0.0.1") -> int:
    app = FastAPI()
    app.add_exception_handler(ApiError, handle_exception)

    @app.get("/x", dependencies=[Depends(AdminGuard(None, own_pages=own_pages))])
    def show() -> dict[str, str]:
        return {}

    return ask(app, "/x", headers, client).status_code


@pytest.mark.parametrize("headers", [PAGE, {**OWN, "Origin": "http://localhost:8000"}], ids=str)
def test_without_an_admin_key_the_page_is_let_in_on_this_machine_alone(headers):
    assert ask_as_page(headers) == 200
    assert ask_as_page(headers, client="10.0.0.7") == 403
    assert ask_as_page(headers, own_pages=False) == 403


@pytest.mark.parametrize(
    "headers",
    [
        OWN,  # says nothing of the page
        {**PAGE, "Sec-Fetch-Site": "same-site"},  # another port of this machine
        {**PAGE, "Sec-Fetch-Site": "cross-site"},
        {**PAGE, "Sec-Fetch-Dest": "iframe"},
        {**PAGE, "Origin": "http://localhost:9000"},
        {**PAGE, "Origin": "null"},
        {**OWN, "Referer": "https://chat.example.com/"},  # a proxy that hides itself
        {**PAGE, "X-Forwarded-For": "10.0.0.7"},
        {**OWN, "Host": "pages.example.com:8000", "Referer": "http://pages.example.com:8000/"},  # rebinding
    ],
    ids=str,
)
def test_without_an_admin_key_other_pages_stay_out(headers):
    assert ask_as_page(headers) == 403


def test_the_history_gives_what_is_new():
    registry = CollectorRegistry()
    tokens = Counter("vllm:generation_tokens", "Generated tokens.", registry=registry)
    outcomes = Counter("vllm:system_prompt_requests", "Requests.", ["outcome"], registry=registry)
    clock = iter([10.0, 15.0])
    history = History(registry, clock=lambda: next(clock))
    assert history.json()["columns"]["time"] == []
    history.sample()
    tokens.inc(7)
    outcomes.labels("hit").inc(2)
    outcomes.labels("created").inc()
    history.sample()
    assert history.json()["columns"]["vllm:generation_tokens_total"] == [0, 7]
    response = ask(app_with_page(history), "/web/history?after=10")
    assert response.json()["columns"]["time"] == [15]
    assert response.json()["columns"]["vllm:system_prompt_requests_total"] == [2]


def test_the_server_serves_it_and_samples(server: ServerProcess):
    with urllib.request.urlopen(f"{server.url}/") as response:
        assert response.headers["content-type"].startswith("text/html")
        assert b"web/app.js" in response.read()
    assert httpx.get(f"{server.url}/web/history").json()["columns"]["time"]
    metrics = httpx.get(f"{server.url}/metrics").text
    names = {line.split("{")[0].split(" ")[0] for line in metrics.splitlines() if not line.startswith("#")}
    assert set(history_module.NAMES) <= names


def test_it_is_off_with_no_web(server_factory, tiny_model_dir):
    size = ("--dtype", "float32", "--max-model-len", "512", "--num-gpu-blocks-override", "64")
    served = server_factory("--model", str(tiny_model_dir), *size, "--no-web")
    assert {httpx.get(served.url + path).status_code for path in ("/", "/web/app.js", "/web/history")} == {404}
    served.stop()
