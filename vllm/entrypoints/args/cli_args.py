"""Flags of the HTTP server."""

from __future__ import annotations

import argparse
import json
import ssl
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.args.compatibility_args import add_compatibility_args
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.chat.reasoning_parsers import REASONING_PARSERS
from vllm.entrypoints.chat.tool_parsers import TOOL_PARSERS
from vllm.exceptions import StartupError

DEFAULT_PORT = 8000
DEFAULT_SHUTDOWN_TIMEOUT_S = 30


def make_arg_parser(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
    """Adds all flags of the server: the engine's, the HTTP server's, and those of other servers."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with flags as `name: value` lines; those given here win"
    )
    EngineArgs.add_cli_args(parser)
    _add_http_args(parser)
    add_compatibility_args(parser)
    return parser


def _add_http_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP server")

    def switch(name: str, text: str) -> None:
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=text)

    group.add_argument("--host", help="address to listen on; all of this machine's by default")
    group.add_argument("--port", type=_port, default=DEFAULT_PORT, help="port to listen on (default: %(default)s)")
    group.add_argument(
        "--uds",
        metavar="PATH",
        help="Unix domain socket to listen on, in place of --host and --port; whoever may write to it may connect",
    )
    group.add_argument(
        "--api-key",
        action="extend",
        nargs="+",
        type=_api_key,
        metavar="KEY",
        help="key that requests must carry; may be given several times (default: VLLM_API_KEY)",
    )
    group.add_argument(
        "--admin-api-key",
        type=_api_key,
        metavar="KEY",
        help="key of /v1/system_prompts; without one only clients on this machine may use it "
        "(default: VLLM_ADMIN_API_KEY)",
    )
    group.add_argument(
        "--system-prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="system prompt to pin before the server answers: its text, or as .json the body of a POST to "
        "/v1/system_prompts (messages, tools, name, ttl, pin); may be given several times",
    )
    group.add_argument("--root-path", type=_root_path, default="", help="path under which a proxy serves this server")
    group.add_argument("--ssl-keyfile", type=_file, help="private key for HTTPS")
    group.add_argument("--ssl-certfile", type=_file, help="certificate for HTTPS")
    group.add_argument("--ssl-ca-certs", type=_file, help="certificates that client certificates are checked with")
    group.add_argument(
        "--ssl-cert-reqs",
        type=int,
        choices=[mode.value for mode in ssl.VerifyMode],
        default=int(ssl.CERT_NONE),
        help="whether client certificates are asked for, as Python's ssl module numbers it (default: %(default)s)",
    )
    group.add_argument(
        "--allowed-origins",
        type=_string_list,
        default=[],
        metavar="LIST",
        help='sites whose pages may use this server from a browser, as JSON; ["*"] for all (default: none)',
    )
    for flag, what in (("methods", "methods"), ("headers", "request headers")):
        group.add_argument(
            f"--allowed-{flag}",
            type=_string_list,
            default=["*"],
            metavar="LIST",
            help=f'{what} that pages of these sites may use, as JSON (default: ["*"])',
        )
    switch("allow-credentials", "let browsers send credentials from other sites")
    group.add_argument(
        "--uvicorn-log-level",
        choices=["critical", "error", "warning", "info", "debug", "trace"],
        default="info",
        help="log level of the HTTP layer (default: %(default)s)",
    )
    switch("disable-uvicorn-access-log", "do not log each HTTP request")
    switch("enable-log-requests", "log the id and parameters of each request; VLLM_LOGGING_LEVEL=DEBUG adds its prompt")
    switch("enable-log-outputs", "log what was generated; needs --enable-log-requests")
    group.add_argument(
        "--enable-log-deltas",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --enable-log-outputs, log each piece of a stream besides the whole (default: %(default)s)",
    )
    group.add_argument(
        "--max-log-len",
        type=_max_log_len,
        metavar="N",
        help="most characters of a text and most token ids of a list in the log of requests (default: all)",
    )
    group.add_argument(
        "--web",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve a page at / that shows the system prompts, the load and a chat (default: %(default)s)",
    )
    switch("disable-fastapi-docs", "do not serve /docs and /openapi.json")
    switch("enable-request-id-headers", "answer X-Request-Id to all requests")
    switch("enable-force-include-usage", "end every stream with its usage, whatever the request's stream_options")
    switch("enable-auto-tool-choice", "let the model call functions as it sees fit; needs --tool-call-parser")
    group.add_argument(
        "--tool-call-parser", choices=sorted(TOOL_PARSERS), help="how the model writes calls of functions"
    )
    switch("exclude-tools-when-tool-choice-none", 'do not show tools to the model where tool_choice is "none"')
    group.add_argument(
        "--reasoning-parser", choices=sorted(REASONING_PARSERS), help="how the model marks what it thinks"
    )
    group.add_argument("--response-role", default="assistant", help="role of chat answers (default: %(default)s)")
    switch("return-tokens-as-token-ids", "name tokens in log-probabilities token_id:ID")
    group.add_argument(
        "--fingerprint-mode",
        choices=["full", "hash", "custom", "none"],
        default="full",
        help="what system_fingerprint of responses holds: version and hash of the model, the hash alone, "
        "--fingerprint-value, or nothing (default: %(default)s)",
    )
    group.add_argument("--fingerprint-value", metavar="TEXT", help="the text of --fingerprint-mode custom")
    group.add_argument(
        "--default-chat-template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help="variables of the chat template for requests that do not set them",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=DEFAULT_SHUTDOWN_TIMEOUT_S,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM (default: %(default)s)",
    )
    group.add_argument(
        "--engine-restarts",
        type=_count,
        default=0,
        metavar="N",
        help="how often an engine process that has died is started again; after that the server ends "
        "(default: %(default)s)",
    )


def check_args(args: argparse.Namespace) -> None:
    """Checks what flags demand of each other.

    Raises:
        StartupError: naming the flags.
    """
    if args.enable_auto_tool_choice and args.tool_call_parser is None:
        raise StartupError(
            f"--enable-auto-tool-choice needs --tool-call-parser, one of {', '.join(sorted(TOOL_PARSERS))}."
        )
    if args.enable_log_outputs and not args.enable_log_requests:
        raise StartupError("--enable-log-outputs needs --enable-log-requests.")
    if (args.fingerprint_mode == "custom") != bool(args.fingerprint_value):
        raise StartupError("--fingerprint-mode custom and --fingerprint-value need each other.")


def _port(text: str) -> int:
    if not text.isdigit() or not 0 <= int(text) <= 65535:
        raise StartupError(f"--port must be a number from 0 to 65535, got {text}.")
    return int(text)


def _api_key(text: str) -> str:
    if not text.strip():
        raise StartupError("--api-key must not be empty; leave it out to serve without a key.")
    return text.strip()


def _root_path(text: str) -> str:
    path = text.rstrip("/")
    if path and not path.startswith("/"):
        raise StartupError(f"--root-path must start with a slash, got {text}.")
    return path


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise StartupError(f"There is no file {text}; the --ssl flags need an existing one.")
    return text


def _seconds(text: str) -> int:
    if not text.isdigit():
        raise StartupError(f"--shutdown-timeout must be a whole number of seconds, 0 or more, got {text}.")
    return int(text)


def _max_log_len(text: str) -> int:
    if not text.isdigit():
        raise StartupError(f"--max-log-len must be a whole number, 0 or more, got {text}.")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise StartupError(f"--engine-restarts must be a whole number, 0 or more, got {text}.")
    return int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise StartupError(f"--default-chat-template-kwargs must be a JSON object, got {text}.")
    return value


def _string_list(text: str) -> list[str]:
    """A JSON list of strings, or names separated by commas."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise StartupError(f'The --allowed flags take a JSON list of strings such as ["*"], got {text}.')
    return value
