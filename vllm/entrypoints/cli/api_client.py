"""What `vllm chat` and `vllm complete` have in common: a running server, asked over its OpenAI API."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.exceptions import StartupError

_CONNECT_TIMEOUT_S = 10


class ApiClient:
    """Client of one model of a server.

    Args:
        url: Base address of the API, with `/v1`.
        api_key: Sent as bearer token; None sends none.
        model: Its name; None takes the first one that the server lists.

    Raises:
        StartupError: the server cannot be reached, turns us away, or has no model.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Answers may take as long as they take; only connecting must not.
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        self._http = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout)
        self._url = url
        self.model = model or self._first_model()

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> ApiClient:
        return cls(args.url, args.api_key or os.environ.get("OPENAI_API_KEY"), args.model_name)

    def _first_model(self) -> str:
        try:
            answer = self._http.get("models")
        except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
            raise self._unreachable(exc) from None
        if answer.status_code != 200:
            raise StartupError(error_of(answer.status_code, answer.text))
        models = answer.json().get("data") or []
        if not models:
            raise StartupError(f"The server at {self._url} lists no model; name one with --model-name.")
        return str(models[0]["id"])

    def _unreachable(self, exc: Exception) -> StartupError:
        return StartupError(f"There is no answer from {self._url} ({exc}); --url names another server.")

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """First choices of the chunks of a streamed answer.

        Raises:
            StartupError: the server answers with an error, or not at all.
        """
        try:
            with self._http.stream("POST", path, json=body | {"model": self.model, "stream": True}) as answer:
                if answer.status_code != 200:
                    raise StartupError(error_of(answer.status_code, answer.read().decode(errors="replace")))
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data in ("", "[DONE]"):
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise StartupError(f"The server says: {chunk['error'].get('message')}")
                    yield from chunk.get("choices", [])[:1]
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from None


def add_client_arguments(parser: FlexibleArgumentParser) -> None:
    parser.add_argument("--url", default="http://localhost:8000/v1", help="address of the API (default: %(default)s)")
    parser.add_argument("--model-name", help="model to ask; the first one of the server if not given")
    parser.add_argument("--api-key", help="key of the server (default: OPENAI_API_KEY)")


def converse(prompt: str, answer: Callable[[str], None]) -> int:
    """Reads lines and has each one answered, until the input ends; returns the exit code.

    An answer that fails is told, and the next line is read.
    """
    print(prompt)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return 0
        if not line.strip():
            continue
        try:
            answer(line)
        except StartupError as exc:
            print(f"error: {exc}")


def error_of(status: int, text: str) -> str:
    """What to tell of an answer that is an error."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text[:200]
    return f"The server answers {status}: {message}"
