"""`vllm run-batch`: answers a file of requests in the OpenAI batch format."""

from __future__ import annotations

import argparse

from vllm.entrypoints.args.parser import FlexibleArgumentParser

USAGE = "-i FILE -o FILE [options]"
DESCRIPTION = (
    "Answers a file of requests in the OpenAI batch format, without a server: chat completions, completions and "
    "responses, a line of JSON each."
)


def add_arguments(parser: FlexibleArgumentParser) -> None:
    from vllm.entrypoints.openai.run_batch import add_arguments

    add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        StartupError: a file cannot be used, or the engine cannot start.
    """
    from vllm.entrypoints.openai.run_batch import run

    return run(args)
