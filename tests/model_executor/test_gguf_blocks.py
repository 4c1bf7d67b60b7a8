"""GGUF files that the CPU serves from their blocks: what is computed is what the dequantised weights give."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tests.engine.helpers import Request, greedy, make_engine, run
from tests.model_executor.block_rows import gguf_blocks
from tests.model_executor.networks import decoder_of, logits_of, logits_of_compiled_steps
from tests.transformers_utils.gguf_files import weights, write_gguf
from vllm.attention.backends.cpu import CpuAttentionBackend
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.engine.llm_engine import LLMEngine
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.gguf import GGUF
from vllm.model_executor.model_loader import iterate_weights
from vllm.model_executor.model_loader.gguf_blocks import blocks_for_cpu
from vllm.model_executor.models.decoder import Decoder
from vllm.model_executor.models.registry import decoder_spec
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.transformers_utils.config import load_hf_config
from vllm.transformers_utils.quantization_config import GGUFFormat

TOKENS = [5, 17, 200, 3, 3, 90, 41, 7, 255, 12, 66, 130, 1, 28, 77, 101, 9, 250, 33, 61]
TEXT = "The lighthouse keeper counted the ships that passed before the storm, and wrote each name in a book. "

pytestmark = pytest.mark.skipif(cpu_kernels.library() is None, reason="the compiled CPU kernels are not built")


def load(path: Path, dtype: torch.dtype = torch.float32, *, in_blocks: bool = True) -> Decoder:
    config = load_hf_config(str(path))
    spec = decoder_spec(config, 64)
    quantization = blocks_for_cpu(str(path), spec, 1) if in_blocks else None
    model = decoder_of(spec, dtype, packed=True, quantization=quantization)
    with torch.no_grad():
        model.load_weights(iterate_weights(str(path), "gguf", config, quantization))
        model.finish()
    return model


def matrices(model: Decoder) -> list[cpu_kernels.Matrix]:
    assert model.program is not None
    return [matrix for layer in model.program.stack.layers for matrix in layer.matrices]


@pytest.mark.parametrize("tied", [True, False])
def test_parts_may_differ_in_type(tied: bool, tmp_path: Path) -> None:
    types = {
        "token_embd": Type.Q8_0,
        "output": Type.Q4_0,
        "attn_q": Type.Q4_1,
        "attn_k": Type.Q5_0,
        "attn_v": Type.Q8_0,
        "attn_output": Type.Q5_1,
        "ffn_gate": Type.Q4_0,
        "ffn_up": Type.Q4_1,
        "ffn_down": Type.Q8_0,
    }
    path = write_gguf(tmp_path / "m.gguf", weights(tied), quantise=types)
    blocks, whole = load(path), load(path, in_blocks=False)
    assert all(isinstance(matrix, cpu_kernels.BlockMatrix) for matrix in matrices(blocks))
    assert blocks.embedding.blocks is not None and blocks.head.packed is not None
    assert isinstance(blocks.head.packed.matrix, cpu_kernels.BlockMatrix)
    backend = CpuAttentionBackend(16)
    assert torch.equal(*(logits_of(model, TOKENS, backend, 16, pinned=7) for model in (blocks, whole)))
    assert torch.equal(*(logits_of_compiled_steps(model, TOKENS, pinned=7) for model in (blocks, whole)))


def test_layers_with_another_type_are_dequantised_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    types = {"attn_q": Type.Q4_1, "attn_k": Type.F16, "attn_v": Type.Q4_1, "ffn_down": Type.Q5_0}
    path = write_gguf(tmp_path / "m.gguf", quantise=types)
    with caplog.at_level(logging.INFO, "vllm"):
        blocks = load(path)
    said = [record.getMessage() for record in caplog.records if "dequantised" in record.getMessage()]
    assert said == [
        "Matrices that are dequantised as they are loaded, since no kernel takes them: 2 of F16, 4 of Q4_1."
    ]
    held = [isinstance(matrix, cpu_kernels.BlockMatrix) for matrix in matrices(blocks)]
    assert held == [False, False, False, True] * 2
    backend = CpuAttentionBackend(16)
    assert torch.equal(*(logits_of(model, TOKENS, backend, 16) for model in (blocks, load(path, in_blocks=False))))


def test_a_file_without_blocks_is_none(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    assert blocks_for_cpu(str(path), decoder_spec(load_hf_config(str(path)), 64), 1) is None


def test_shares_of_ranks_consist_of_whole_blocks(tmp_path: Path) -> None:
    """96 columns are three blocks, and 16 rows of a rank's k are a tile."""
    path = write_gguf(tmp_path / "m.gguf", quantise=Type.Q4_1)
    spec = decoder_spec(load_hf_config(str(path)), 64)
    for ranks, down in ((1, True), (2, False)):
        quantization = blocks_for_cpu(str(path), spec, ranks)
        assert quantization is not None
        formats = [quantization.format_of((f"model.layers.0.mlp.{part}_proj",)) for part in ("down", "up")]
        assert [format is not None for format in formats] == [down, True]
        assert (quantization.format_of(("model.embed_tokens",)) is None) == (ranks == 2)


def test_ranks_hold_their_shares() -> None:
    raw = {part: gguf_blocks("Q4_K", size, 256, size) for part, size in (("q", 64), ("k", 32), ("v", 32))}
    last, last_weight = gguf_blocks("Q5_1", 24, 128)
    x, y = torch.randn(3, 256), torch.randn(3, 128)
    columns, sums = [], torch.zeros(3, 24)
    for rank in range(2):
        tp = TensorParallelGroup(rank, 2)
        method = GGUF(GGUFFormat(tuple((part, "Q4_K") for part in raw)))
        layer = MergedColumnParallelLinear(256, {"q": 64, "k": 32, "v": 32}, frozenset(), tp, method)
        for part, (rows, _) in raw.items():
            layer.load((part,), "weight", torch.from_numpy(rows).view(len(rows), 1, 144))
        layer.finish()
        columns.append(layer(x).split([32, 16, 16], dim=1))
        row_method = GGUF(GGUFFormat((("", "Q5_1"),)))
        row = RowParallelLinear(128, 24, False, tp, row_method)
        row.load(("o",), "weight", torch.from_numpy(last).view(24, 4, 24))
        row.finish()
        sums += row_method.apply(row, y[:, 64 * rank : 64 * rank + 64])
    for i, (_, weight) in enumerate(raw.values()):
        torch.testing.assert_close(torch.cat([shares[i] for shares in columns], 1), x @ weight.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums, y @ last_weight.T, rtol=1e-4, atol=1e-3)


def test_a_share_that_cuts_a_block_is_refused() -> None:
    with pytest.raises(
        ValueError, match="48 input features of a rank are no multiple of 32, the weights in a block of Q8"
    ):
        RowParallelLinear(96, 16, False, TensorParallelGroup(0, 2), GGUF(GGUFFormat((("", "Q8_0"),))))


@pytest.fixture(scope="module")
def engines(default_model_path: str) -> Callable[[bool], LLMEngine]:
    def start(in_blocks: bool, **args: object) -> LLMEngine:
        with pytest.MonkeyPatch.context() as patch:
            if not in_blocks:
                patch.setattr("vllm.worker.worker.blocks_for_cpu", lambda *_: None)
            return make_engine(default_model_path, **args)

    return start


def test_the_default_model_answers_as_from_dequantised_weights(engines: Callable[..., LLMEngine]) -> None:
    """Tokens and log-probabilities, to the bit; alone, in company, behind pins."""
    answers = []
    for in_blocks in (True, False):
        engine = engines(in_blocks)
        text = engine.tokenizer.encode(TEXT * 8)
        requests = [Request(text[i : i + 40 + 7 * i], 30 if i % 2 else None) for i in range(6)]
        outputs = run(engine, requests, greedy(12, logprobs=5)) + run(engine, requests[:1], greedy(12, logprobs=5))
        answers.append(
            [
                (list(o.outputs[0].token_ids), [{t: p.logprob for t, p in at.items()} for at in o.outputs[0].logprobs])
                for o in outputs
            ]
        )
        engine.shutdown()
    assert answers[0] == answers[1]


@pytest.mark.nightly
def test_snapshots_are_kept_apart_from_those_of_dequantised_weights(
    engines: Callable[..., LLMEngine], tmp_path: Path
) -> None:
    digests = []
    for in_blocks in (True, False):
        engine = engines(in_blocks, system_prompt_cache_dir=str(tmp_path))
        worker = engine.core.executor._worker
        digests.append(worker.transfers._store.identity.digest)
        matrix = worker.model.program.stack.layers[0].qkv
        assert isinstance(matrix, cpu_kernels.BlockMatrix) == in_blocks
        engine.shutdown()
    assert digests[0] != digests[1]


def test_blocks_are_fewer_bytes(default_model_path: str) -> None:
    size = Path(default_model_path).stat().st_size
    model = load(Path(default_model_path))
    held = sum(m.data.numel() for m in matrices(model)) + model.embedding.blocks.data.numel()
    assert 0.95 * size < held < size
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 0
    assert gguf.GGML_QUANT_SIZES[Type.Q4_1] == (32, 20)
