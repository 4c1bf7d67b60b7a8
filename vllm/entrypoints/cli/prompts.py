"""`vllm prompts`: the system prompts that a running server has pinned."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.cli.api_client import error_of
from vllm.exceptions import StartupError

USAGE = "{list,add,remove,stats} [options]"
DESCRIPTION = "Shows, adds and removes the system prompts that a running server has pinned."
_PATH = "/v1/system_prompts"
_CONNECT_TIMEOUT_S = 10
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COLUMNS = ("id", "name", "state", "pin", "source", "tokens", "size", "uses", "saved", "readers", "used", "expires")


def add_arguments(parser: FlexibleArgumentParser) -> None:
    common = FlexibleArgumentParser(add_help=False)
    common.add_argument("--url", default="http://localhost:8000", help="address of the server (default: %(default)s)")
    common.add_argument("--api-key", help="the server's --admin-api-key (default: VLLM_ADMIN_API_KEY)")
    common.add_argument("--json", action="store_true", help="print what the server answers, as JSON")
    actions = parser.add_subparsers(dest="action", metavar="{list,add,remove,stats}", required=True)
    actions.add_parser("list", parents=[common], help="list the prompts of the pool")
    add = actions.add_parser("add", parents=[common], help="pin a system prompt")
    add.add_argument(
        "file",
        metavar="FILE",
        help="the text of the system message; a .json file holds messages, tools, name, ttl and pin; - reads text",
    )
    add.add_argument("--name", help="name in listings; that of the file if not given")
    add.add_argument("--ttl", type=float, metavar="SECONDS", help="unused for so long, it goes; never if not given")
    add.add_argument("--pin", choices=("hard", "soft"), help="soft pins give way to hard ones (default: hard)")
    remove = actions.add_parser("remove", parents=[common], help="end a pin")
    remove.add_argument("id", nargs="+", metavar="ID", help="id or name, as `list` shows it")
    actions.add_parser("stats", parents=[common], help="show how full the pool is, and what it did for requests")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        StartupError: the server cannot be reached, or refuses.
    """
    key = args.api_key or os.environ.get("VLLM_ADMIN_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Pinning is answered when the prompt is computed, which takes as long as it takes; only connecting must not.
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
    url = args.url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=url, headers=headers, timeout=timeout) as client:
        server = _Server(client, url)
        return {"list": _list, "add": _add, "remove": _remove, "stats": _stats}[args.action](server, args)


class _Server:
    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url

    def ask(self, method: str, path: str = "", body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, _PATH + path, json=body)
        except (httpx.TransportError, httpx.InvalidURL) as exc:
            raise StartupError(f"There is no answer from {self._url} ({exc}); --url names another server.") from None
        if answer.status_code != 200:
            raise StartupError(error_of(answer.status_code, answer.text))
        found: dict[str, Any] = answer.json()
        return found


def _list(server: _Server, args: argparse.Namespace) -> int:
    answer = server.ask("GET")
    if args.json:
        return _print_json(answer["data"])
    now = time.time()
    _print_table(_COLUMNS, [_row(prompt, now) for prompt in answer["data"]])
    for warning in answer["warnings"]:
        print(f"warning: {warning['message']}")
    return 0


def _add(server: _Server, args: argparse.Namespace) -> int:
    made = server.ask("POST", body=_body(args))
    if args.json:
        return _print_json(made)
    _print_table(_COLUMNS, [_row(made, time.time())])
    return 0


def _body(args: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any]
    try:
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
        if args.file.endswith(".json"):
            body = json.loads(text)
            if not isinstance(body, dict):
                raise StartupError(f"{args.file} must hold a JSON object with messages.")
        else:
            # The newline that ends a text file is none of the prompt's.
            body = {"messages": [{"role": "system", "content": text.removesuffix("\n")}]}
    except OSError as exc:
        raise StartupError(f"{args.file} cannot be read: {exc.strerror}.") from None
    except ValueError as exc:
        raise StartupError(f"{args.file} must be UTF-8, and JSON if it is called so: {exc}.") from None
    if args.file != "-":
        body.setdefault("name", Path(args.file).stem)
    return body | {key: getattr(args, key) for key in ("name", "ttl", "pin") if getattr(args, key) is not None}


def _remove(server: _Server, args: argparse.Namespace) -> int:
    named: dict[str, list[str]] = {}
    for prompt in server.ask("GET")["data"]:
        named.setdefault(prompt["name"], []).append(prompt["id"])
    answers = []
    for given in args.id:
        ids = named.get(given, [given])
        if len(ids) > 1:
            raise StartupError(f"{len(ids)} prompts are called {given}; remove them by id: {' '.join(ids)}.")
        answers.append(server.ask("DELETE", f"/{ids[0]}"))
    if args.json:
        return _print_json(answers)
    for answer in answers:
        print(f"{answer['id']}: {answer['message']}")
    return 0


def _stats(server: _Server, args: argparse.Namespace) -> int:
    answer = server.ask("GET")
    if args.json:
        return _print_json({key: answer[key] for key in ("pool", "refused", "warnings")})
    pool = dict(answer["pool"])
    outcomes = pool.pop("outcomes")
    rows: list[tuple[str, ...]] = [(name.replace("_", " "), str(value)) for name, value in pool.items()]
    rows += [(f"requests: {name.replace('_', ' ')}", str(count)) for name, count in sorted(outcomes.items())]
    _print_table(("", ""), rows)
    if answer["refused"]:
        print("\nsystem prompts that ran unpinned")
        columns = ("id", "num_tokens", "outcome", "requests")
        _print_table(columns, [tuple(str(entry[key]) for key in columns) for entry in answer["refused"]])
    return 0


def _row(prompt: dict[str, Any], now: float) -> tuple[str, ...]:
    return (
        prompt["id"],
        prompt["name"] or "-",
        prompt["state"],
        prompt["pin"],
        prompt["source"],
        str(prompt["num_tokens"]),
        _size(prompt["num_bytes"]),
        str(prompt["uses"]),
        str(prompt["tokens_saved"]),
        str(prompt["readers"]),
        f"{_duration(now - prompt['last_used'])} ago",
        "never" if prompt["expires"] is None else f"in {_duration(prompt['expires'] - now)}",
    )


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if unit else f"{num_bytes} B"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    lines = [columns, *rows] if any(columns) else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2, ensure_ascii=False))
    return 0
