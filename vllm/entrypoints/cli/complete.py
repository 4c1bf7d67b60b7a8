"""`vllm complete`: has texts completed by a model of a running server."""

from __future__ import annotations

import argparse

from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.cli.api_client import ApiClient, add_client_arguments, converse

USAGE = "[options]"
DESCRIPTION = "Has texts completed by a model of a running server; Ctrl-D ends it."


def add_arguments(parser: FlexibleArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument("--max-tokens", type=int, help="most tokens to generate; the server's default if not given")
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="complete this one text and end")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        StartupError: the server cannot be used.
    """
    client = ApiClient.from_cli_args(args)
    limit = {} if args.max_tokens is None else {"max_tokens": args.max_tokens}

    def answer(text: str) -> None:
        for choice in client.stream("completions", {"prompt": text, **limit}):
            print(choice.get("text") or "", end="", flush=True)
        print()

    if args.quick is not None:
        answer(args.quick)
        return 0
    print(f"Using model: {client.model}")
    return converse("Please enter prompt to complete:", answer)
