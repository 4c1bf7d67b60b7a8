"""Builds the compiled CPU kernels; all else is declared in pyproject.toml.

`csrc/cpu` is compiled once for each instruction set and linked into `vllm/cpu_kernels.so`, which chooses among them
when it is loaded. It is plain C++ behind a C interface: no headers of Python or torch are needed, and one build serves
every version of both. Without a C++20 compiler, or on another kind of processor, the package is installed without it.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cpu"

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
# The order is that of linking: inline library functions are taken from the file compiled for every processor.
FLAGS = {
    "module.cpp": [],
    "block_packing.cpp": [],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": AVX512_BF16,
    "isa_amx.cpp": AMX,  # compiles to nothing without these flags
}
# GCC 12's own AVX-512 headers use values that are left uninitialised on purpose.
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def knows_amx(compiler: list[str]) -> bool:
    """Whether the compiler and its assembler do."""
    command = [*compiler, *AMX, "-x", "c++", "-c", "-o", os.devnull, "-"]
    program = 'void release() { asm volatile("tilerelease"); }'
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


class BuildKernels(build_ext):
    """Compiles with per-file flags, as many files at a time as there are processors.

    `CXX` names the compiler, `CXXFLAGS` and `LDFLAGS` add to the command lines (sanitizers, for instance).
    """

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        extra, link_extra = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(name: str) -> str:
            output = str(objects / f"{name}.o")
            flags = FLAGS[name]
            if flags is AMX and not knows_amx(compiler):
                flags = []
            subprocess.run([*compiler, *COMMON, *flags, *extra, "-c", str(SOURCES / name), "-o", output], check=True)
            return output

        try:
            if platform.machine() not in ("x86_64", "AMD64"):
                raise OSError(f"they are for x86-64, this is {platform.machine()}")
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                files = list(pool.map(compile_one, FLAGS))
            subprocess.run([*compiler, "-shared", *link_extra, "-o", str(target), *files, "-ldl"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            # The extension is optional: setuptools says so and goes on.
            raise CompileError(f"the CPU kernels are not built, torch will compute instead: {error}") from None

    def copy_extensions_to_source(self) -> None:
        # A server that runs has the old file in its memory: it keeps it, and the new one takes its name.
        (ROOT / "vllm" / "cpu_kernels.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, ext_name: str) -> str:
        return f"{ext_name.replace('.', '/')}.so"


setup(
    ext_modules=[
        Extension(
            "vllm.cpu_kernels",
            [f"csrc/cpu/{name}" for name in FLAGS],
            depends=[f"csrc/cpu/{header.name}" for header in sorted(SOURCES.glob("*.h"))],  # a source archive has them
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
