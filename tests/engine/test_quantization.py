"""int8 weights on the CPU: what is computed with them, where they cannot be had, and what is kept apart from others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.helpers import Request, assert_nothing_held, greedy, make_engine, run, tokens
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.llm_engine import LLMEngine
from vllm.exceptions import StartupError
from vllm.ops.cpu import kernels as cpu_kernels

TEXT = "The lighthouse keeper counted the ships that passed before the storm, and wrote each name in a book. "


@pytest.fixture(scope="module")
def engine(default_model_path: str) -> Iterator[LLMEngine]:
    if cpu_kernels.library() is None:
        pytest.skip("the compiled CPU kernels are not built")
    engine = make_engine(default_model_path, quantization="int8_cpu")
    yield engine
    engine.shutdown()


def test_matrices_are_int8_and_cache_and_embeddings_are_not(engine: LLMEngine) -> None:
    worker = engine.core.executor._worker
    matrices = [m for layer in worker.model.program.stack.layers for m in layer.matrices]
    matrices.append(worker.model.head.packed.matrix)
    assert {m.data.dtype for m in matrices} == {torch.int8}
    assert worker.model.embedding.weight.dtype == torch.float32
    assert worker.runner.cache.k_caches[0].dtype == torch.float32


def test_tokens_are_those_of_the_whole_weights_for_a_while(engine: LLMEngine, default_model_path: str) -> None:
    whole = make_engine(default_model_path)
    text = engine.tokenizer.encode(TEXT * 3)
    requests = [Request(text[i : i + 40]) for i in range(6)]
    first, second = (run(e, requests, greedy(1, logprobs=20)) for e in (engine, whole))
    whole.shutdown()
    same = 0
    for ours, theirs in zip(first, second, strict=True):
        (int8,), (float32,) = ours.outputs[0].logprobs, theirs.outputs[0].logprobs
        shared = int8.keys() & float32.keys()
        assert len(shared) >= 15
        differences = [abs(int8[t].logprob - float32[t].logprob) for t in shared]
        # Some difference, or nothing was quantised.
        assert 1e-4 < sum(differences) / len(differences) < 0.15
        same += ours.outputs[0].token_ids == theirs.outputs[0].token_ids
    assert same >= 5


def test_tokens_do_not_depend_on_company_or_pins(engine: LLMEngine) -> None:
    text = engine.tokenizer.encode(TEXT * 12)
    requests = [Request(text[i : i + 90 + 7 * i], 80 if i % 2 else None) for i in range(5)]
    together = tokens(run(engine, requests, greedy(10)))
    assert engine.core.pool.num_prefills == 2
    engine.reset_prefix_cache()
    assert [tokens(run(engine, [request], greedy(10)))[0] for request in requests] == together
    unpinned = [Request(request.token_ids) for request in requests]
    assert tokens(run(engine, unpinned, greedy(10))) == together
    assert_nothing_held(engine)


def test_kv_of_quantised_weights_has_keys_of_its_own(tiny_model_dir: Path) -> None:
    digests = [
        EngineArgs(model=str(tiny_model_dir), quantization=name).create_engine_config().model.weights_digest
        for name in (None, "none", "int8_cpu")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_unknown_method(tiny_model_dir: Path) -> None:
    with pytest.raises(StartupError, match=r"--quantization aqlm is not supported .* choose from fp8, awq"):
        make_engine(tiny_model_dir, quantization="aqlm")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"attention_backend": "TORCH"}, r"is of the compiled CPU kernels.*leave it out"),
        ({"dtype": "float16"}, r"cannot serve this model: dtype float16 is neither float32 nor bfloat16"),
    ],
    ids=["attention_backend", "dtype"],
)
def test_without_the_compiled_kernels_it_is_refused(tiny_model_dir: Path, args: dict[str, object], why: str) -> None:
    with pytest.raises(StartupError, match=f"--quantization int8_cpu {why}"):
        make_engine(tiny_model_dir, quantization="int8_cpu", **args)


def test_layers_that_are_computed_one_by_one_are_int8_too(tiny_model_dir: Path) -> None:
    # Such blocks are too small for the compiled attention, and with it for the compiled stack of layers.
    engine = make_engine(tiny_model_dir, quantization="int8_cpu", block_size=8)
    layer = engine.core.executor._worker.model.layers[0]
    assert {m.packed.data.dtype for m in (layer.mixer.qkv, layer.mixer.o, layer.ffn.gate_up)} == {torch.int8}
    assert run(engine, [Request([5, 6, 7, 8])], greedy(4))[0].outputs[0].token_ids
    engine.shutdown()
