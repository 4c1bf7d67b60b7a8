"""What a new engine process is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm.engine.arg_utils import EngineArgs
from vllm.engine.core_process import check_weights
from vllm.engine.llm_engine import LLMEngine
from vllm.engine.messages import CoreProcessArgs
from vllm.exceptions import StartupError
from vllm.transformers_utils import gguf
from vllm.transformers_utils.config import hf_config_of, weights_digest
from vllm.transformers_utils.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", ["directory", "gguf", "quantised"])
def test_the_configuration_arrives_as_it_was(kind: str, tiny_model_dir: Path, default_model_path: str) -> None:
    rope = {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    overrides: dict[str, object] = {"rope_parameters": rope}
    if kind == "quantised":
        overrides["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    args = EngineArgs(
        default_model_path if kind == "gguf" else str(tiny_model_dir),
        served_model_name=["a", "b"],
        hf_overrides=overrides,
        system_prompt_ttl=5.5,
        max_num_queued_reqs=3,
    )
    sent = args.create_engine_config()
    line = CoreProcessArgs(sent, "in", "out").to_line()
    assert line.count(b"\n") == 1
    got = CoreProcessArgs.read(line, hf_config_of)
    assert (got.input_address, got.output_address) == ("in", "out")
    ours, theirs = sent.model.hf_config, got.config.model.hf_config
    assert type(theirs) is type(ours)
    assert (theirs.to_dict(), theirs.dtype) == (ours.to_dict(), ours.dtype)
    assert theirs.rope_parameters["factor"] == 2.0
    assert getattr(theirs, "quantization_config", None) == overrides.get("quantization_config")
    assert replace(got.config, model=replace(got.config.model, hf_config=ours)) == sent


def test_each_file_of_a_model_is_read_once(default_model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, loaded = [], []
    parse, build = gguf.GGUFFile._parse, Tokenizer.__init__

    def counted_parse(self: gguf.GGUFFile) -> None:
        parsed.append(self.path)
        parse(self)

    def counted_build(self: Tokenizer, *args: object) -> None:
        loaded.append(self)
        build(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(gguf.GGUFFile, "_parse", counted_parse)
    monkeypatch.setattr(Tokenizer, "__init__", counted_build)
    config, tokenizer = EngineArgs(default_model_path).resolve()
    assert (len(parsed), loaded) == (1, [tokenizer])
    # A process that is handed the configuration reads neither.
    CoreProcessArgs.read(CoreProcessArgs(config, "in", "out").to_line(), hf_config_of)
    assert (len(parsed), len(loaded)) == (1, 1)


def test_an_engine_loads_its_tokenizer_once(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    build = Tokenizer.__init__

    def counted_build(self: Tokenizer, *args: object) -> None:
        loaded.append(self)
        build(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Tokenizer, "__init__", counted_build)
    args = EngineArgs(str(tiny_model_dir), dtype="float32", num_gpu_blocks_override=256)
    engine = LLMEngine.from_engine_args(args)
    assert loaded == [engine.tokenizer]
    engine.shutdown()


def test_an_engine_process_does_not_take_other_weights_for_its_own(tiny_model_dir: Path) -> None:
    model = EngineArgs(str(tiny_model_dir)).create_engine_config().model
    check_weights(model)
    with pytest.raises(StartupError, match=r"The model in .* has changed since the server was started; restart it\."):
        check_weights(replace(model, weights_digest=weights_digest(__file__)))
