"""What the server says of itself as the last lines of its start: what it serves, where, and how to try it."""

from __future__ import annotations

import argparse
import json
import socket

from vllm import envs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.logger import init_logger

# The name under which these lines have always come.
logger = init_logger("vllm.entrypoints.openai.api_server")


def address_of(sock: socket.socket, args: argparse.Namespace) -> str:
    """Where clients find the server, without `/v1`."""
    scheme = "https" if args.ssl_certfile else "http"
    if args.uds is not None:
        return f"{scheme}://localhost{args.root_path}"
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{shown}:{port}{args.root_path}"


def log_start(engine: AsyncLLMEngine, args: argparse.Namespace, address: str) -> None:
    """Logs the lines; `address` is that of `address_of`."""
    config = engine.vllm_config
    logger.info(
        "Model: %s, dtype %s, context %d tokens", config.model.model, config.model.dtype, config.model.max_model_len
    )
    logger.info("KV cache: %d tokens", engine.num_blocks * config.cache.block_size)
    logger.info(
        "System prompts: mode %s, at most %d tokens pinned", config.system_prompt.mode, engine.pool_budget_tokens
    )
    where = (
        f"{args.uds} ({address.partition(':')[0]}, paths under {args.root_path}/v1)" if args.uds else f"{address}/v1"
    )
    logger.info("Serving %s on %s", config.model.served_model_names[0], where)
    if args.web and not args.uds:
        logger.info("Page: %s/", address)
    logger.info("Try: %s", _curl(engine, args, address))
    reference = "" if args.disable_fastapi_docs or args.uds else f", routes at {address}/docs"
    logger.info("Documentation: docs/index.md%s", reference)


def _curl(engine: AsyncLLMEngine, args: argparse.Namespace, address: str) -> str:
    """A request in one line that can be copied into a shell."""
    body: dict[str, object] = {"max_tokens": 32}
    if engine.renderer.has_template:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "What is a colophon?"}]
    else:
        path, body["prompt"] = "completions", "A colophon is"
    options = f"--unix-socket {args.uds} " if args.uds else ""
    key = '-H "Authorization: Bearer $VLLM_API_KEY" ' if args.api_key or envs.api_key() else ""
    return f"curl {options}{address}/v1/{path} {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'"
