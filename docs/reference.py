"""Writes docs/flags.md from the parser of flags and docs/metrics.md from the metrics themselves.

`python docs/reference.py` writes them; `python docs/reference.py --check` says whether they are what it would write.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import CollectorRegistry

from vllm.config import VllmConfig
from vllm.engine.metrics import EngineMetrics
from vllm.entrypoints.args.cli_args import make_arg_parser
from vllm.entrypoints.args.compatibility_args import _NoEffect, _Unsupported
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.http.metrics import HttpMetricsMiddleware

DOCS = Path(__file__).resolve().parent
# Flags that vLLM does not have; all others mean here what they mean there.
_OWN = ("--system-prompt", "--admin-api-key", "--web", "--engine-restarts")
_NOTE = "<!-- Written by `python docs/reference.py`; do not edit. -->\n"


def flags() -> str:
    """Every flag of `vllm serve`: those that do something, those without effect, those that are refused."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve", add_help=False))
    lines = [
        "# Flags\n",
        _NOTE,
        "`vllm serve` and `python -m vllm.entrypoints.openai.api_server` take the same flags. Those marked ◆ are this "
        "server's own; all others mean what they mean in vLLM.\n",
    ]
    without_effect: set[str] = set()
    refused: dict[str, tuple[str, ...]] = {}
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            name = action.option_strings[0] if action.option_strings else action.dest
            if isinstance(action, _NoEffect):
                without_effect.add(name)
            elif isinstance(action, _Unsupported):
                refused[name] = action._allowed
            elif action.help is not argparse.SUPPRESS:
                rows.append(_flag_row(action))
        if rows:
            title = "General" if group.title in ("options", "positional arguments") else str(group.title).capitalize()
            lines += [f"## {title.replace('Http', 'HTTP')}\n", "| flag | meaning |", "|---|---|", *rows, ""]
    without_effect -= {f"--no-{name.removeprefix('--')}" for name in refused}
    lines += [
        "## Accepted without effect\n",
        "They change only speed or logs in vLLM, or belong to a feature that has to be asked for elsewhere. The log "
        "says so in a line each.\n",
        ", ".join(f"`{name}`" for name in sorted(without_effect)) + "\n",
        "## Refused\n",
        "The server does not start, and names the flag, where it asks for more than what is done anyway.\n",
        "| flag | taken all the same |",
        "|---|---|",
        *(f"| `{name}` | {' or '.join(f'`{v}`' for v in refused[name]) or '–'} |" for name in sorted(refused)),
    ]
    return "\n".join(lines) + "\n"


def _flag_row(action: argparse.Action) -> str:
    names = [name for name in action.option_strings if not name.startswith("--no-")] or [action.dest]
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    if action.choices:
        text = text.rstrip(".") + f". One of {', '.join(map(str, action.choices))}."
    own = " ◆" if any(names[0].startswith(prefix) for prefix in _OWN) else ""
    return f"| {', '.join(f'`{name}`' for name in names)}{own} | {text.replace('|', chr(92) + '|')} |"


def metrics() -> str:
    """Every metric of `/metrics` but those of the process and of Python."""
    config = SimpleNamespace(
        model=SimpleNamespace(served_model_names=["model"], max_model_len=4096, dtype="bfloat16"),
        cache=SimpleNamespace(block_size=16, gpu_memory_utilization=0.9, enable_prefix_caching=True),
    )
    http = CollectorRegistry()
    HttpMetricsMiddleware(cast(Any, None), http)
    engine = EngineMetrics(cast(VllmConfig, config), num_blocks=1).registry
    lines = [
        "# Metrics\n",
        _NOTE,
        "`/metrics` has the names of vLLM, and those of the pool (`vllm:system_prompt_…`), which are its own. "
        "Each `vllm:` metric has the labels `model_name` and `engine`; its own labels are named here. Counters end in "
        "`_total`; histograms have `_bucket`, `_sum` and `_count`.\n",
        "| metric | kind | labels | meaning |",
        "|---|---|---|---|",
    ]
    for registry in (engine, http):
        for family in sorted(registry.collect(), key=lambda family: family.name):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = _labels(family)
            lines.append(
                f"| `{name}` | {family.type} | {', '.join(f'`{x}`' for x in labels) or '–'} | {family.documentation} |"
            )
    return "\n".join(lines) + "\n"


def _labels(family: Any) -> list[str]:
    common = {"model_name", "engine", "le"}
    if family.name.startswith("http_"):
        # Those of HTTP have no samples before the first request.
        return {
            "http_requests": ["method", "status", "handler"],
            "http_request_duration_seconds": ["method", "handler"],
            "http_request_duration_highr_seconds": [],
        }.get(family.name, ["handler"])
    return list(dict.fromkeys(label for sample in family.samples for label in sample.labels if label not in common))


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the tables of flags and metrics.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is out of date")
    check = parser.parse_args().check
    stale = []
    for path, text in ((DOCS / "flags.md", flags()), (DOCS / "metrics.md", metrics())):
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if not check:
                path.write_text(text)
    if check and stale:
        print(f"{' and '.join(stale)} are out of date: run python docs/reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
