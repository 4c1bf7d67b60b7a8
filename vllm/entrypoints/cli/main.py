"""The `vllm` command: `vllm serve`, `vllm --version`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm.entrypoints.cli import serve
from vllm.entrypoints.cli.parser import FlexibleArgumentParser
from vllm.exceptions import StartupError
from vllm.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = FlexibleArgumentParser(prog="vllm", description="An OpenAI-compatible server with pinned system prompts.")
    parser.add_argument("-v", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        usage="vllm serve [MODEL] [options]",
        description="Serves a model over the OpenAI API.",
        help="serve a model over HTTP (vllm serve --help lists its flags)",
    )
    # The flags of the engine bring torch with them; `vllm --version` need not wait for it.
    if "serve" in argv:
        serve.add_arguments(serve_parser)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        sys.exit(0)
    try:
        code = serve.run(args)
    except StartupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
