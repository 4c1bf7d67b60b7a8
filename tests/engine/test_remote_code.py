"""A tokenizer that is code of the checkpoint: read where the flag allows it, on each road to an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vllm import LLM, SamplingParams
from vllm.exceptions import StartupError

CODE = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    slow_tokenizer_class = None
"""


@pytest.fixture
def model_with_code(tiny_model_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "own_tokenizer.py").write_text(CODE)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    path.write_text(json.dumps(config))
    return folder


def test_llm_runs_it_when_told(model_with_code: Path) -> None:
    llm = LLM(str(model_with_code), trust_remote_code=True, dtype="float32", num_gpu_blocks_override=300)
    try:
        (output,) = llm.generate("Once", SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
        assert type(llm.get_tokenizer()).__name__ == "OwnTokenizer"
        assert len(output.outputs[0].token_ids) == 2
    finally:
        llm.llm_engine.shutdown()


def test_llm_does_not_run_it_untold(model_with_code: Path) -> None:
    with pytest.raises(StartupError):
        LLM(str(model_with_code), dtype="float32", num_gpu_blocks_override=300)
