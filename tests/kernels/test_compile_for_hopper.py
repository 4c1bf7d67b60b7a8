"""The kernels of attention and of experts compile for Hopper: the interpreter does not see it, and an engine ends at
start-up if not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
SCRIPT = Path(__file__).with_name("compile_for_hopper.py")
EXPERTS = Path(__file__).with_name("compile_moe_for_hopper.py")
QUANTIZED = Path(__file__).with_name("compile_quantized_for_hopper.py")


def compile_cases(*arguments: str, script: Path = SCRIPT) -> str:
    """In a process of its own: here kernels are interpreted, and the driver is that of the machine."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(SCRIPT.parents[2])
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this Triton comes without NVIDIA's assembler")
@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("llama", ("_kernel", "_prefix_kernel", "_suffix_kernel")),
        pytest.param("all", ("_prefix_kernel", "_suffix_kernel"), marks=pytest.mark.nightly),
    ],
)
def test_kernels_compile(case: str, kernels: tuple[str, ...]) -> None:
    printed = compile_cases("--once", case)
    for kernel in (*kernels, "_merge_kernel"):
        assert f"{case} {kernel} " in printed


@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this Triton comes without NVIDIA's assembler")
@pytest.mark.nightly
def test_kernels_of_experts_compile() -> None:
    printed = compile_cases("--once", "qwen3", script=EXPERTS)
    for kernel in ("_route_kernel", "_sort_kernel", "_gate_up_kernel", "_down_kernel", "_sum_kernel"):
        assert f"qwen3 {kernel} " in printed


@pytest.mark.nightly
def test_kernels_of_all_kinds_of_experts_compile() -> None:
    assert "gpt-oss-mxfp4 _packed_kernel " in compile_cases(script=EXPERTS)


@pytest.mark.nightly
def test_all_kernels_of_all_kinds_of_layers_compile() -> None:
    compile_cases()


@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this Triton comes without NVIDIA's assembler")
@pytest.mark.parametrize("once", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_kernels_of_quantised_weights_compile(once: bool) -> None:
    printed = compile_cases(*(["--once"] if once else []), script=QUANTIZED)
    for kernel in ("row4", "tile4", "unpack", "row8", "tile8", "norm", "activate", "sum"):
        assert f"_{kernel}_kernel " in printed
