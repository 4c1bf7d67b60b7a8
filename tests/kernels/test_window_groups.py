"""A network with a window group on the Triton backend, from prompts to greedy tokens: what torch's attention generates.

Step by step, and through the graph runner, whose steps are launched anew where a GPU would replay them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.engine.helpers import Request, assert_nothing_held, greedy, make_engine, run, tokens
from tests.kernels.kernel_inputs import DEVICE
from vllm.attention.backends.triton import TritonAttentionBackend
from vllm.engine.llm_engine import LLMEngine
from vllm.ops.triton.sampling import DrawKernels
from vllm.worker.graph_runner import CapturedDecode, CapturedMixed, GraphRunner
from vllm.worker.model_runner import ModelRunner

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/engine/test_gpu.py does it with real graphs"),
]

WINDOW, VOCABULARY, NUM_TOKENS = 20, 120, 5


class Relaunched:
    """Stands for a captured graph."""

    def __init__(self, launch: Callable[[], object]) -> None:
        self.replay = torch.inference_mode()(launch)


def relaunching(runner: ModelRunner, max_num_seqs: int, max_num_batched_tokens: int) -> GraphRunner:
    """A graph runner for a device that has no graphs."""
    runner.sampler.kernels = DrawKernels(runner.sampler.rows.tables, max_num_seqs)
    graphs = GraphRunner(
        runner.model,
        runner.cache,
        runner.backend,  # type: ignore[arg-type]
        runner.token_ids,
        runner.sampler,
        max_num_seqs,
        max_num_batched_tokens,
    )
    for size in graphs._sizes:
        parts = (
            lambda size=size: graphs._decode_step(size, plain=False),
            lambda size=size: graphs._decode_step(size, plain=True),
            lambda size=size: graphs._restrict(size),
        )
        graphs._decode[size] = CapturedDecode(*map(Relaunched, parts))  # type: ignore[arg-type]
    for size in graphs._mixed_sizes:
        hidden = torch.zeros(size, runner.model.hidden_size)
        step = Relaunched(lambda size=size, hidden=hidden: hidden.copy_(graphs._mixed_step(size)))
        graphs._mixed[size] = CapturedMixed(step, hidden)  # type: ignore[arg-type]
    return graphs


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of two layers, the first with a window, with random weights."""
    from tokenizers import Tokenizer, models
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gemma3")
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256,
        initializer_range=0.4,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()


def generated(engine: LLMEngine) -> list[list[int]]:
    """Pins shorter and longer than the window, one that continues another; own texts that leave it, or begin to."""
    long = text(70, 1)
    engine.add_system_prompt(long[:45])
    requests = [
        Request([*long[:45], *text(3, 2)], 45),
        Request([*long[:45], *text(WINDOW + 5, 3)], 45),
        Request([*long, *text(2, 4)], 70),
        Request([*text(9, 5), *text(WINDOW - 12, 6)], 9),
        Request(text(35, 8)),
    ]
    found = tokens(run(engine, requests, greedy(NUM_TOKENS)))
    assert_nothing_held(engine)
    engine.shutdown()
    return found


def make(folder: Path) -> LLMEngine:
    return make_engine(
        folder,
        attention_backend="TORCH",
        max_model_len=256,
        num_gpu_blocks_override=96,
        max_num_seqs=4,
        max_num_batched_tokens=32,
    )


@pytest.mark.parametrize("graphs", [True, False])
def test_greedy_tokens_are_those_of_torch(gemma_dir: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    want = generated(make(gemma_dir))
    assert len({tuple(output) for output in want}) == len(want)
    monkeypatch.setattr("vllm.worker.worker.get_backend", lambda *_: TritonAttentionBackend(DEVICE, 16))
    engine = make(gemma_dir)
    runner = engine.core.executor._worker.runner
    assert runner.cache.window is not None and isinstance(runner.backend, TritonAttentionBackend)
    if graphs:
        runner.graphs = relaunching(runner, 4, 32)
    assert generated(engine) == want
