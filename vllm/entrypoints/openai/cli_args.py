"""Flags of the HTTP server, and the flags of other servers that are accepted or refused here."""

from __future__ import annotations

import argparse
import json
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.parser import FlexibleArgumentParser
from vllm.entrypoints.openai.reasoning_parsers import REASONING_PARSERS
from vllm.entrypoints.openai.tool_parsers import TOOL_PARSERS
from vllm.exceptions import StartupError
from vllm.logger import init_logger

logger = init_logger(__name__)

DEFAULT_PORT = 8000
DEFAULT_SHUTDOWN_TIMEOUT_S = 30

# Flags that would only change speed or logs in other servers, by what follows them: nothing, or a value.
_NO_EFFECT_SWITCHES = (
    "async-scheduling",
    "cudagraph-metrics",
    "disable-async-output-proc",
    "disable-cascade-attn",
    "disable-chunked-mm-input",
    "disable-custom-all-reduce",
    "disable-frontend-multiprocessing",
    "disable-hybrid-kv-cache-manager",
    "disable-log-requests",
    "disable-log-stats",
    "disable-mm-preprocessor-cache",
    "enable-chunked-prefill",
    "enable-dbo",
    "enable-eplb",
    "enable-expert-parallel",
    "enable-layerwise-nvtx-tracing",
    "enable-log-deltas",
    "enable-log-outputs",
    "enable-log-requests",
    "enable-mfu-metrics",
    "enable-prompt-tokens-details",
    "enable-reasoning",
    "enable-server-load-tracking",
    "interleave-mm-strings",
    "kv-cache-metrics",
    "kv-sharing-fast-prefill",
    "language-model-only",
    "log-error-stack",
    "ray-workers-use-nsight",
    "skip-mm-profiling",
    "use-tqdm-on-load",
    "use-v2-block-manager",
)
_NO_EFFECT_VALUES = (
    "all2all-backend",
    "allowed-local-media-path",
    "allowed-media-domains",
    "block-allocator",
    "collect-detailed-traces",
    "compilation-config",
    "cuda-graph-sizes",
    "data-parallel-address",
    "data-parallel-backend",
    "data-parallel-rpc-port",
    "download-dir",
    "guided-decoding-backend",
    "h11-max-header-count",
    "h11-max-incomplete-event-size",
    "ignore-patterns",
    "kv-offloading-backend",
    "kv-offloading-size",
    "limit-mm-per-prompt",
    "log-config-file",
    "long-prefill-token-threshold",
    "lora-dtype",
    "master-addr",
    "master-port",
    "max-cpu-loras",
    "max-cudagraph-capture-size",
    "max-log-len",
    "max-long-partial-prefills",
    "max-lora-rank",
    "max-loras",
    "max-num-partial-prefills",
    "max-parallel-loading-workers",
    "max-seq-len-to-capture",
    "mm-encoder-tp-mode",
    "mm-processor-cache-gb",
    "num-lookahead-slots",
    "num-scheduler-steps",
    "optimization-level",
    "otlp-traces-endpoint",
    "performance-mode",
    "preemption-mode",
    "prefix-caching-hash-algo",
    "pt-load-map-location",
    "safetensors-load-strategy",
    "scheduler-delay-factor",
    "show-hidden-metrics-for-version",
    "stream-interval",
    "swap-space",
)

# Flags whose feature does not exist here: the values that mean what this server does anyway.
_UNSUPPORTED_SWITCHES = (
    "calculate-kv-scales",
    "disable-sliding-window",
    "enable-force-include-usage",
    "enable-lora",
    "enable-prompt-embeds",
    "enable-return-routed-experts",
    "enable-sleep-mode",
    "enable-ssl-refresh",
    "enable-tokenizer-info-endpoint",
    "headless",
    "skip-tokenizer-init",
)
_UNSUPPORTED_VALUES: dict[str, tuple[str, ...]] = {
    "additional-config": ("{}",),
    "api-server-count": ("1",),
    "attention-config": ("{}",),
    "chat-template-content-format": ("auto", "string"),
    "code-revision": (),
    "config-format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu-offload-gb": ("0",),
    "data-parallel-rank": ("0",),
    "data-parallel-size": ("1",),
    "data-parallel-size-local": ("1",),
    "distributed-executor-backend": ("uni", "mp"),
    "hf-config-path": (),
    "hf-overrides": ("{}",),
    "hf-token": (),
    "io-processor-plugin": (),
    "kv-cache-dtype-skip-layers": (),
    "kv-events-config": (),
    "kv-transfer-config": (),
    "logits-processors": (),
    "logprobs-mode": ("raw_logprobs",),
    "lora-modules": (),
    "media-io-kwargs": ("{}",),
    "middleware": (),
    "mm-processor-kwargs": ("{}",),
    "model-impl": ("auto", "vllm"),
    "model-loader-extra-config": ("{}",),
    "nnodes": ("1",),
    "node-rank": ("0",),
    "num-speculative-tokens": (),
    "override-pooler-config": (),
    "pipeline-parallel-size": ("1",),
    "pooler-config": (),
    "rope-scaling": (),
    "rope-theta": (),
    "runner": ("auto", "generate"),
    "scheduler-cls": (),
    "scheduling-policy": ("fcfs",),
    "speculative-config": (),
    "speculative-model": (),
    "ssl-ciphers": (),
    "structured-outputs-config": (),
    "task": ("auto", "generate"),
    "tokenizer-mode": ("auto", "hf"),
    "tokenizer-revision": (),
    "tool-parser-plugin": (),
    "uds": (),
    "worker-cls": ("auto",),
    "worker-extension-cls": (),
}


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
    group.add_argument("--host", help="address to listen on; all of this machine's by default")
    group.add_argument("--port", type=_port, default=DEFAULT_PORT, help="port to listen on (default: %(default)s)")
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
    for flag, what in (("origins", "origins"), ("methods", "methods"), ("headers", "request headers")):
        group.add_argument(
            f"--allowed-{flag}",
            type=_string_list,
            default=["*"],
            metavar="LIST",
            help=f'{what} that browsers may use from other sites, as JSON (default: ["*"])',
        )
    group.add_argument(
        "--allow-credentials", action="store_true", help="let browsers send credentials from other sites"
    )
    group.add_argument(
        "--uvicorn-log-level",
        choices=["critical", "error", "warning", "info", "debug", "trace"],
        default="info",
        help="log level of the HTTP layer (default: %(default)s)",
    )
    group.add_argument("--disable-uvicorn-access-log", action="store_true", help="do not log each HTTP request")
    group.add_argument("--disable-fastapi-docs", action="store_true", help="do not serve /docs and /openapi.json")
    group.add_argument("--enable-request-id-headers", action="store_true", help="answer X-Request-Id to all requests")
    group.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="let the model call functions as it sees fit; needs --tool-call-parser",
    )
    group.add_argument(
        "--tool-call-parser", choices=sorted(TOOL_PARSERS), help="how the model writes calls of functions"
    )
    group.add_argument(
        "--exclude-tools-when-tool-choice-none",
        action="store_true",
        help='do not show tools to the model where tool_choice is "none"',
    )
    group.add_argument(
        "--reasoning-parser", choices=sorted(REASONING_PARSERS), help="how the model marks what it thinks"
    )
    group.add_argument("--response-role", default="assistant", help="role of chat answers (default: %(default)s)")
    group.add_argument(
        "--return-tokens-as-token-ids", action="store_true", help="name tokens in log-probabilities token_id:ID"
    )
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


def add_compatibility_args(parser: FlexibleArgumentParser) -> None:
    accepted = sorted(_NO_EFFECT_SWITCHES + _NO_EFFECT_VALUES)
    refused = [f"--{name}" for name in _UNSUPPORTED_SWITCHES]
    refused += [f"--{n} other than {' or '.join(v)}" if v else f"--{n}" for n, v in _UNSUPPORTED_VALUES.items()]
    # They are many and do nothing: --help names them in two sentences instead of a line each.
    group = parser.add_argument_group(
        "flags of other servers",
        f"Accepted without effect: {', '.join(f'--{name}' for name in accepted)}. "
        f"Refused: {', '.join(sorted(refused))}.",
    )
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for name in _NO_EFFECT_SWITCHES:
        group.add_argument(f"--{name}", f"--no-{name}", action=_NoEffect, nargs=0, **hidden)
    for name in _NO_EFFECT_VALUES:
        group.add_argument(f"--{name}", action=_NoEffect, **hidden)
    for name in _UNSUPPORTED_SWITCHES:
        group.add_argument(f"--{name}", action=_Unsupported, nargs=0, **hidden)
        group.add_argument(f"--no-{name}", action=_NoEffect, nargs=0, **hidden)
    for name, allowed in _UNSUPPORTED_VALUES.items():
        group.add_argument(f"--{name}", action=_Unsupported, allowed=allowed, **hidden)


class _NoEffect(argparse.Action):
    """Accepts a flag and warns."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        logger.warning("%s has no effect in this server.", option)


class _Unsupported(argparse.Action):
    """Refuses a flag unless its value asks for what happens anyway."""

    def __init__(self, option_strings: Sequence[str], dest: str, allowed: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self._allowed = allowed

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if isinstance(values, str) and values.lower() in self._allowed:
            return
        if self._allowed:
            raise StartupError(
                f"{option} {values} is not supported by this server; only {' or '.join(self._allowed)} is."
            )
        raise StartupError(f"{option} is not supported by this server; start it without.")


def check_args(args: argparse.Namespace) -> None:
    """Checks what flags demand of each other.

    Raises:
        StartupError: naming the flags.
    """
    if args.enable_auto_tool_choice and args.tool_call_parser is None:
        raise StartupError(
            f"--enable-auto-tool-choice needs --tool-call-parser, one of {', '.join(sorted(TOOL_PARSERS))}."
        )


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
