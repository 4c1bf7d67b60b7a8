"""The `vllm` command: `vllm serve`, `vllm chat`, `vllm bench serve`, …; `vllm --help` lists them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.exceptions import StartupError
from vllm.version import __version__

# Each is a module of this package, with a dash for an underscore, that has `USAGE`, `DESCRIPTION`,
# `add_arguments(parser)` and `run(args) -> exit code`.
_COMMANDS = {
    "serve": "serve a model over HTTP (vllm serve --help lists its flags)",
    "chat": "chat with a model of a running server",
    "complete": "let a model of a running server complete a text",
    "prompts": "show, add and remove the pinned system prompts of a running server",
    "run-batch": "answer a file of requests, without a server",
    "bench": "measure a running server, or the engine by itself",
    "collect-env": "print what a bug report should say about this machine",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = FlexibleArgumentParser(prog="vllm", description="An OpenAI-compatible server with pinned system prompts.")
    parser.add_argument("-v", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # Only the command that is asked for is loaded: the flags of the engine bring torch with them.
    chosen = next((arg for arg in argv if not arg.startswith("-")), None)
    for name, text in _COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=text)
            continue
        command = importlib.import_module(f"vllm.entrypoints.cli.{name.replace('-', '_')}")
        usage = f"vllm {name} {command.USAGE}"
        command.add_arguments(commands.add_parser(name, help=text, usage=usage, description=command.DESCRIPTION))
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        sys.exit(0)
    try:
        code = command.run(args)
    except StartupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # whoever read our output has seen enough, as in `vllm collect-env | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
