"""`vllm chat`: talks with a model of a running server."""

from __future__ import annotations

import argparse

from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.cli.api_client import ApiClient, add_client_arguments, converse

USAGE = "[options]"
DESCRIPTION = "Chats with a model of a running server; Ctrl-D ends the chat."


def add_arguments(parser: FlexibleArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument("--system-prompt", help="system message that the chat begins with")
    parser.add_argument("-q", "--quick", metavar="MESSAGE", help="send this one message, print the answer and end")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        StartupError: the server cannot be used.
    """
    client = ApiClient.from_cli_args(args)
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []

    def answer(text: str) -> None:
        asked = [*messages, {"role": "user", "content": text}]
        said = ""
        for choice in client.stream("chat/completions", {"messages": asked}):
            delta = choice.get("delta") or {}
            new = (delta.get("reasoning") or "") + (delta.get("content") or "")
            said += delta.get("content") or ""
            print(new, end="", flush=True)
        print()
        # A turn that failed is not part of the chat: the next message must not follow it.
        messages[:] = [*asked, {"role": "assistant", "content": said}]

    if args.quick is not None:
        answer(args.quick)
        return 0
    print(f"Using model: {client.model}")
    return converse("Please enter a message for the chat model:", answer)
