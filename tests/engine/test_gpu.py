"""The engine on a GPU against transformers on the same GPU: greedy tokens in float32, log-probabilities in bfloat16.

Of two tokens whose logits differ by less than rounding, either may come; each later one is judged by what precedes it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.helpers import Request, add, assert_nothing_held, finish, greedy, make_engine, run, tokens
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.gpu

VOCABULARY, NUM_TOKENS = 4096, 64
# Of float32 sums over 16 layers, relative to the largest logit.
ROUNDING = 2e-5
SYSTEM_LENGTHS = (33, 700, 1500, 64, 65, 300, 901, 2000)


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"top_p": 0.9},
    {"temperature": 0, "logprobs": 5},
    {"top_k": 30, "min_p": 0.01, "temperature": 0.7},
    {"top_k": 500, "top_p": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"logit_bias": {77: 5.0}, "allowed_token_ids": list(range(20, 4000, 3)), "logprobs": 0},
    {"min_tokens": 5, "stop_token_ids": [100], "bad_words": ["<101>"], "prompt_logprobs": 2},
    {"structured_outputs": StructuredOutputsParams(regex="(<1[0-9]>)+")},
]


def make_llama(folder: Path, layers: int, hidden_size: int) -> torch.nn.Module:
    """A random Llama in float32, written to a folder with a tokenizer that knows its ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 256,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model.cuda()


def make_gemma(folder: Path, generation: int) -> torch.nn.Module:
    """A random Gemma 2 (capped scores) or 3 (normalised queries and keys) in float32: layers with a window of 100
    tokens and layers without; written to a folder as `make_llama` does."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(generation)
    config_class, model_class = (
        (Gemma2Config, Gemma2ForCausalLM) if generation == 2 else (Gemma3TextConfig, Gemma3ForCausalLM)
    )
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=100,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=8192,
        # With tied ones a random network repeats its last token, whatever attention says.
        tie_word_embeddings=False,
        # Its kernels for whole sequences leave the cap of the scores out.
        attn_implementation="eager",
    )
    model = model_class(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model.cuda()


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_requests(num_systems: int) -> list[Request]:
    """24 prompts; two of three start with one of the system prompts."""
    rng = random.Random(num_systems)

    def ids(n: int) -> list[int]:
        return [rng.randrange(10, VOCABULARY) for _ in range(n)]

    systems = [ids(n) for n in SYSTEM_LENGTHS[:num_systems]]
    requests = []
    for i in range(24):
        own = ids(rng.choice((1, 2, 5, 17, 40, 130, 300)))
        if i % 3 == 2:
            requests.append(Request(own))
        else:
            system = systems[i % num_systems]
            requests.append(Request(system + own, len(system)))
    return requests


@pytest.fixture(scope="module", params=[2, 16], ids=lambda n: f"{n}_layers")
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    folder = tmp_path_factory.mktemp("llama")
    yield folder, make_llama(folder, request.param, 512)


def logits_of(model: torch.nn.Module, request: Request, output: list[int]) -> torch.Tensor:
    """Of every token of an output, after what precedes it; [n, vocabulary]."""
    ids = torch.tensor([request.token_ids + output[:-1]], device="cuda")
    with torch.inference_mode():
        return model(ids, logits_to_keep=len(output), use_cache=False).logits[0]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_greedy_tokens_are_those_of_transformers(llama: tuple[Path, torch.nn.Module], eager: bool) -> None:
    check_greedy_tokens(*llama, eager)


@pytest.mark.parametrize("generation", [2, 3])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_greedy_tokens_of_networks_with_windows(tmp_path: Path, generation: int, eager: bool) -> None:
    """System prompts shorter and much longer than the window; answers that leave it, too."""
    check_greedy_tokens(tmp_path, make_gemma(tmp_path, generation), eager)


# Layers with a window have a cache group of their own in all of them.
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "nothing pinned": {"system_prompt_cache": "off"},
    "chunks, and too few blocks": {"num_gpu_blocks_override": 190, "max_num_batched_tokens": 200},
    "pins on the host": {"system_prompt_cache_tokens": 720, "system_prompt_host_cache_gib": 0.2},
}


@pytest.mark.parametrize("generation", [2, 3])
def test_no_way_to_compute_windows_changes_a_token(tmp_path: Path, generation: int) -> None:
    """Eager or by graphs, pinned or not, in one step or in chunks across the edges, preempted, back from the host."""
    make_gemma(tmp_path, generation)
    requests = make_requests(3)
    found = {}
    for name, args in WAYS.items():
        options = {"max_model_len": 1280, "num_gpu_blocks_override": 4000, "max_num_seqs": 32, "device": "cuda"}
        engine = make_engine(tmp_path, **(options | args))
        worker = engine.core.executor._worker
        assert worker.runner.cache.window is not None and worker.runner.cache.window.num_blocks > 0
        assert (worker.runner.graphs is None) == (name == "eager")
        found[name] = tokens(run(engine, requests, greedy(NUM_TOKENS)))
        if "blocks" in name:
            assert engine.core.scheduler.num_preemptions > 0
        if name == "pins on the host":
            # One by one, so that prompts take turns on the device.
            found[name] = [tokens(run(engine, [request], greedy(NUM_TOKENS)))[0] for request in requests]
        (several,) = run(engine, requests[:1], greedy(NUM_TOKENS, n=3))
        outputs = [list(output.token_ids) for output in several.outputs]
        assert outputs == [outputs[0]] * 3 and outputs[0] == found[name][0]
        assert_nothing_held(engine)
        assert engine.core.scheduler.blocks.windows.num_used_blocks == 0
        engine.shutdown()
    # Sums in another order may decide between two tokens that are as likely: one request in 24 at most.
    for name, other in found.items():
        assert sum(a != b for a, b in zip(found["graphs"], other, strict=True)) <= 1, name


def check_greedy_tokens(folder: Path, model: torch.nn.Module, eager: bool) -> None:
    engine = make_engine(
        folder, max_model_len=4096, num_gpu_blocks_override=4000, max_num_seqs=32, enforce_eager=eager, device="cuda"
    )
    ties = 0
    for num_systems in (1, 3, 8):
        requests = make_requests(num_systems)
        outputs = tokens(run(engine, requests, greedy(NUM_TOKENS)))
        for request, output in zip(requests, outputs, strict=True):
            logits = logits_of(model, request, output)
            chosen = logits.gather(-1, torch.tensor(output, device="cuda").unsqueeze(-1)).squeeze(-1)
            short = logits.amax(-1) - chosen
            assert float(short.max()) <= ROUNDING * float(logits.abs().max()), (num_systems, len(request.token_ids))
            ties += int((short > 0).sum())
    # 3 x 24 x 64 tokens.
    assert ties <= 2
    engine.shutdown()


def test_sampled_tokens_are_the_same_with_graphs(tmp_path: Path) -> None:
    """Of seeded requests of every kind. The last bits of a logit may differ between batch shapes, and with them, once
    in a great many draws, a token; from there on that request goes its own way."""
    make_llama(tmp_path, 2, 512)
    requests = make_requests(3)
    kinds = [SAMPLED[i % len(SAMPLED)] for i in range(len(requests))]
    params = [SamplingParams(seed=i, max_tokens=40, ignore_eos=True, **kind) for i, kind in enumerate(kinds)]
    found = []
    for eager in (False, True):
        engine = make_engine(
            tmp_path,
            max_model_len=4096,
            num_gpu_blocks_override=4000,
            max_num_seqs=32,
            enforce_eager=eager,
            device="cuda",
        )
        found.append(tokens(run(engine, requests, params)))
        # Alone, two at a time, with others at their prompts: rows and batch sizes that differ.
        found.append([tokens(run(engine, [r], [p]))[0] for r, p in zip(requests[:9], params, strict=False)])
        engine.shutdown()
    for other in found[1:]:
        assert sum(a != b for a, b in zip(found[0], other, strict=False)) <= 1


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tmp_path: Path) -> None:
    """Over the same tokens: mean and 99th percentile of |log-probability - that in float32|."""
    from transformers import LlamaForCausalLM

    model = make_llama(tmp_path, 16, 1024)
    engine = make_engine(
        tmp_path, dtype="bfloat16", max_model_len=4096, num_gpu_blocks_override=4000, max_num_seqs=32, device="cuda"
    )
    requests = make_requests(3)
    outputs = run(engine, requests, greedy(NUM_TOKENS, logprobs=0))
    half = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda()
    ours, theirs = [], []
    for request, output in zip(requests, outputs, strict=True):
        drawn = list(output.outputs[0].token_ids)
        index = torch.tensor(drawn, device="cuda").unsqueeze(-1)
        exact, other = (
            torch.log_softmax(logits_of(m, request, drawn).float(), -1).gather(-1, index).squeeze(-1).cpu()
            for m in (model, half)
        )
        found = output.outputs[0].logprobs
        assert found is not None
        ours.append((torch.tensor([entry[t].logprob for t, entry in zip(drawn, found, strict=True)]) - exact).abs())
        theirs.append((other - exact).abs())
    engine.shutdown()
    ours_all, theirs_all = torch.cat(ours), torch.cat(theirs)
    figures = [(float(d.mean()), float(d.quantile(0.99))) for d in (ours_all, theirs_all)]
    print(f"bfloat16 against float32 (mean, 99th percentile): ours {figures[0]}, transformers {figures[1]}")
    # 1,536 tokens: the two estimates differ by chance alone.
    assert figures[0][0] <= 1.1 * figures[1][0]
    assert figures[0][1] <= 1.15 * figures[1][1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_no_kernel_is_compiled_while_requests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """All that batches of any kind launch was compiled at start; a kernel that was not would hold all requests up."""
    import triton

    if family == "llama":
        make_llama(tmp_path, 2, 1024)
    else:
        make_gemma(tmp_path, int(family[-1]))
    engine = make_engine(
        tmp_path,
        dtype="bfloat16",
        max_model_len=8000,
        num_gpu_blocks_override=8000,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        device="cuda",
    )
    compiled: list[str] = []

    def note(*, fn: object, **_: object) -> None:
        compiled.append(str(getattr(fn, "name", fn)))

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    rng = random.Random(0)

    def prompts(count: int, own: int, system: list[int] | None = None) -> list[Request]:
        head = system or []
        tails = ([rng.randrange(10, VOCABULARY) for _ in range(own)] for _ in range(count))
        return [Request(head + tail, len(head) or None) for tail in tails]

    systems = [[rng.randrange(10, VOCABULARY) for _ in range(n)] for n in (600, 3000)]
    for i, requests in enumerate(
        (
            prompts(1, 1),
            prompts(1, 3000),
            prompts(60, 3),
            prompts(60, 100),
            prompts(30, 100) + prompts(30, 300),
            prompts(3, 7000) + prompts(20, 1),
            prompts(60, 100, systems[0]),
            prompts(1, 100, systems[1]),
            prompts(20, 300, systems[1]) + prompts(20, 1, systems[0]) + prompts(20, 200),
        )
    ):
        for j, request in enumerate(prompts(3, 40, systems[0]) + requests):
            params = SamplingParams(max_tokens=20 + j % 7, ignore_eos=True, **SAMPLED[(i + j) % len(SAMPLED)])
            add(engine, f"{i}-{j}", request, params)
            if j == 2:
                # Some are past their prompts when the others come.
                for _ in range(4):
                    engine.step()
        finish(engine)
    engine.shutdown()
    assert compiled == []
