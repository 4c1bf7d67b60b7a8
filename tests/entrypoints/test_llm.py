"""`LLM` as scripts for vLLM call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm import LLM, SamplingParams
from vllm.exceptions import StartupError, VLLMValidationError

SIZE: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "num_gpu_blocks_override": 64, "seed": 0}
# What vLLM's own scripts pass, at its defaults.
DEFAULTS: dict[str, Any] = {
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "allowed_local_media_path": "",
    "cpu_offload_gb": 0.0,
    "swap_space": 4,
    "block_size": None,
    "enable_lora": False,
    "hf_overrides": None,
    "pooler_config": None,
    "compilation_config": None,
    "distributed_executor_backend": None,
    "data_parallel_size": 1,
    "logprobs_mode": "raw_logprobs",
    "runner": "auto",
    "language_model_only": True,
}
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    return LLM(str(tiny_model_dir), **SIZE, **DEFAULTS)


def test_keywords_ask_for_what_the_command_line_would_refuse(tiny_model_dir: Path) -> None:
    for keywords in ({"enable_lora": True}, {"cpu_offload_gb": 4}, {"speculative_config": {"model": "x"}}):
        with pytest.raises(StartupError, match="is not supported by this server"):
            LLM(str(tiny_model_dir), **keywords)
    with pytest.raises(TypeError, match="'nonsense'"):
        LLM(str(tiny_model_dir), nonsense=1)


def test_calls_take_vllms_keywords(llm: LLM) -> None:
    ids = list(range(300, 340))
    cut = llm.generate(ids, GREEDY, use_tqdm=False, priority=[1], tokenization_kwargs={"truncate_prompt_tokens": 5})
    assert cut[0].prompt_token_ids == ids[-5:]
    kept = {"truncate_prompt_tokens": 5, "truncation_side": "right"}
    assert llm.generate(ids, GREEDY, use_tqdm=False, tokenization_kwargs=kept)[0].prompt_token_ids == ids[:5]
    said = [{"role": "user", "content": "Hi"}]
    chat = llm.chat(
        said, GREEDY, use_tqdm=False, chat_template_content_format="auto", priority=[0], mm_processor_kwargs=None
    )
    assert len(chat[0].outputs[0].token_ids) == 3
    for wrong in ({"priority": [1, 2]}, {"tokenization_kwargs": {"padding": True}}, {"lora_request": object()}):
        with pytest.raises(VLLMValidationError):
            llm.generate(ids, GREEDY, use_tqdm=False, **wrong)


def test_other_methods_work_or_say_why_not(llm: LLM) -> None:
    assert llm.reset_prefix_cache() is True
    llm.sleep(level=1)
    with pytest.raises(VLLMValidationError, match="wake_up"):
        llm.generate("Hi", GREEDY, use_tqdm=False)
    llm.wake_up(tags=["weights", "kv_cache"])
    assert llm.generate("Hi", GREEDY, use_tqdm=False)[0].outputs[0].text is not None
    for method in (llm.start_profile, llm.collective_rpc, llm.apply_model, llm.encode, llm.embed, llm.score):
        with pytest.raises(NotImplementedError, match=r"\w{4,}"):
            method("x")
