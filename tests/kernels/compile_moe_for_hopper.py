"""Compiles the kernels of experts for a Hopper GPU, on a machine that has none; see `compile_for_hopper`.

`python compile_moe_for_hopper.py [--once] CASE…`; with --once, only for one token and for the most.
"""

from __future__ import annotations

import sys
import time
from typing import Any
from unittest import mock

import torch
from triton.runtime import driver

from tests.kernels.compile_for_hopper import MAX_SHARED, HopperDriver
from vllm.ops.moe import ClampedSwiGLU, Experts, Routing
from vllm.ops.triton import moe, mxfp4, routing

BF16 = torch.bfloat16
GPT_OSS = ClampedSwiGLU(1.702, 7.0)


class Case:
    """Experts of hidden size H and size F, and how they are chosen."""

    def __init__(
        self, experts: int, hidden: int, size: int, routing: Routing, packed: bool = False, **options: Any
    ) -> None:
        self.packed = packed
        self.num_experts, self.hidden, self.size, self.routing = experts, hidden, size, routing
        self.options = options

    def make(self) -> Experts:
        """Their weights, in memory that is never touched."""
        gate_up = torch.empty(self.num_experts, 2 * self.size, self.hidden, dtype=BF16)
        down = torch.empty(self.num_experts, self.hidden, self.size, dtype=BF16)
        made = Experts(gate_up, down, "silu")._replace(**self.options)
        if not self.packed:
            return made
        stacks = [
            torch.empty((*stack.shape[:2], -(-stack.shape[2] // 128) * 32), dtype=torch.int16) for stack in made[:2]
        ]
        scales = [torch.empty(len(one), one.shape[2] // 32, one.shape[1], dtype=torch.int32) for one in stacks]
        return made._replace(gate_up=stacks[0], down=stacks[1], gate_up_scales=scales[0], down_scales=scales[1])


BIASES = {"gate_up_bias": torch.zeros(32, 5760, dtype=BF16), "down_bias": torch.zeros(32, 2880, dtype=BF16)}
CASES = {
    "qwen3": Case(128, 2048, 768, Routing(8, renormalise=True)),
    "mixtral": Case(8, 4096, 14336, Routing(2, renormalise=True)),
    "gpt-oss": Case(32, 2880, 2880, Routing(4, scoring="chosen"), activation=GPT_OSS, **BIASES),
    "gpt-oss-mxfp4": Case(32, 2880, 2880, Routing(4, scoring="chosen"), True, activation=GPT_OSS, **BIASES),
}


def compile_case(name: str, case: Case, once: bool) -> None:
    done: set[tuple] = set()

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        started = time.perf_counter()
        options |= {"PDL": True, "launch_pdl": True}
        constants = {k: v for k, v in options.items() if isinstance(v, int)}
        key = (kernel, tuple(constants.items()))
        if key in done:
            return
        done.add(key)
        compiled = kernel.warmup(*args, grid=grid, **options)
        shared, asm = compiled.metadata.shared, compiled.asm["ptx"]
        shown = " ".join(f"{k}={int(v)}" for k, v in constants.items() if k.startswith(("BLOCK", "num", "TMA")))
        print(
            f"{name} {kernel.__name__} {time.perf_counter() - started:.1f} s, {shared} bytes shared, "
            f"wgmma {asm.count('wgmma.mma_async')}: {shown}",
            flush=True,
        )
        if shared > MAX_SHARED:
            raise SystemExit(f"{kernel.__name__} needs {shared} bytes of shared memory; a program has {MAX_SHARED}.")

    experts = case.make()
    with (
        mock.patch.object(moe, "launch", launch),
        mock.patch.object(routing, "launch", launch),
        mock.patch.object(mxfp4, "launch", launch),
        mock.patch.object(moe, "gpu_generation", lambda device: (9, 0)),
    ):
        for tokens in (1, 8192) if once else (1, 64, 256, 512, 1024, 8192):
            x = torch.empty(tokens, case.hidden, dtype=BF16)
            logits = torch.zeros(tokens, case.num_experts, dtype=BF16)
            moe.mix_experts(x, logits, None, None, case.routing, experts, x)


if __name__ == "__main__":
    driver.set_active(HopperDriver())
    once = "--once" in sys.argv
    for case in [argument for argument in sys.argv[1:] if argument != "--once"] or CASES:
        compile_case(case, CASES[case], once)
