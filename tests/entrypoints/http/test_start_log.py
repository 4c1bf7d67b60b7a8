"""The last lines of the start: a person can go on from them without reading anything else."""

from __future__ import annotations

import json
import shlex

import httpx

from server_process import ServerProcess


def test_the_last_lines_name_the_page_a_request_to_try_and_the_documentation(server: ServerProcess):
    lines = [line.split("] ", 1)[1] for line in server.log_path.read_text().splitlines() if "api_server] " in line]
    start = lines.index(next(line for line in lines if line.startswith("Serving ")))
    said = dict(line.split(": ", 1) for line in lines[start + 1 : start + 4])
    assert list(said) == ["Page", "Try", "Documentation"]
    assert httpx.get(said["Page"]).headers["content-type"].startswith("text/html")
    program, url, *options = shlex.split(said["Try"])
    assert program == "curl"
    headers = dict([options[options.index("-H") + 1].split(": ")])
    answer = httpx.post(url, headers=headers, content=options[options.index("-d") + 1], timeout=60)
    assert json.loads(answer.text)["choices"][0]["message"]["role"] == "assistant"
