"""`vllm serve [MODEL]`."""

from __future__ import annotations

import argparse

from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.exceptions import StartupError

USAGE = "[MODEL] [options]"
DESCRIPTION = "Serves a model over the OpenAI API. --help=listgroup names the groups of flags, --help=GROUP shows one."


def add_arguments(parser: FlexibleArgumentParser) -> None:
    from vllm.entrypoints.args.cli_args import make_arg_parser

    parser.add_argument(
        "model_tag",
        nargs="?",
        metavar="MODEL",
        help="folder, .gguf file or Hugging Face id; a small default if omitted",
    )
    make_arg_parser(parser)


def run(args: argparse.Namespace) -> int:
    """Starts the server; returns its exit code.

    Raises:
        StartupError: two different models are named.
    """
    from vllm.entrypoints.openai.api_server import run_server

    if args.model_tag is not None:
        if args.model is not None and args.model != args.model_tag:
            raise StartupError(f"Two models are named, {args.model_tag} and --model {args.model}; give one.")
        args.model = args.model_tag
    return run_server(args)
