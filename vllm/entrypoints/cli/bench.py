"""`vllm bench serve`, `vllm bench throughput`, `vllm bench latency`."""

from __future__ import annotations

import argparse

from vllm.entrypoints.args.parser import FlexibleArgumentParser

USAGE = "{serve,throughput,latency} [options]"
DESCRIPTION = "Measures a running server (serve), or the engine by itself (throughput, latency)."


def add_arguments(parser: FlexibleArgumentParser) -> None:
    from vllm.benchmarks import serve
    from vllm.entrypoints.cli import bench_offline as offline

    kinds = parser.add_subparsers(dest="kind", metavar="{serve,throughput,latency}", required=True)
    serve_parser = kinds.add_parser("serve", help="load on a running server, and how long its answers take")
    serve.add_arguments(serve_parser)
    serve_parser.set_defaults(run=serve.run)
    throughput = kinds.add_parser("throughput", help="requests and tokens a second when all are there at once")
    offline.add_throughput_arguments(throughput)
    throughput.set_defaults(run=offline.run_throughput)
    latency = kinds.add_parser("latency", help="how long one batch takes")
    offline.add_latency_arguments(latency)
    latency.set_defaults(run=offline.run_latency)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that `args` name; returns the exit code.

    Raises:
        StartupError: a value is not allowed, or what is to be measured cannot be had.
    """
    return int(args.run(args))
