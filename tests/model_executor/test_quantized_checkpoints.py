"""Checkpoints in every quantised format against the same checkpoints with whole weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.helpers import Request, greedy, make_engine, run, tokens
from tests.model_executor.networks import decoder_of, logits_of
from tests.model_executor.quantized_checkpoints import FORMS, Form, awq, gptq, llama_config, llama_tensors, quantised
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.exceptions import StartupError
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.dequantised import Dequantised
from vllm.model_executor.layers.quantization.select import scheme_of
from vllm.model_executor.layers.quantization.unquantized import Unquantized
from vllm.model_executor.models.decoder import Decoder
from vllm.model_executor.models.registry import decoder_spec
from vllm.transformers_utils.quantization_config import method_name, quantization_of

TOKEN_IDS = [(7 * i * i + 3) % 50 for i in range(20)]


def load(config: Any, tensors: dict[str, torch.Tensor], form: Form | None = None, **options: Any) -> Decoder:
    quantization = None if form is None else quantization_of(form.config, None, "the test")
    model = decoder_of(decoder_spec(config, 64), quantization=quantization, **options)
    with torch.no_grad():
        model.load_weights(tensors.items())
        model.finish()
    return model


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_the_dequantised_checkpoint(name: str) -> None:
    config, form = llama_config(), FORMS[name]
    packed, whole = quantised(llama_tensors(config), form)
    want = logits_of(load(config, whole), TOKEN_IDS)
    found = logits_of(load(config, packed, form), TOKEN_IDS)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["fp8 block", "fp8 tensor", "awq 32", "pack asymmetric 32", "nvfp4", "gptq 32"])
def test_tensors_that_a_checkpoint_has_fused(name: str) -> None:
    config = llama_config(num_key_value_heads=8, architectures=["Phi3ForCausalLM"])
    config.partial_rotary_factor = 1.0
    config.model_type, config.pad_token_id = "phi3", 0
    tensors = llama_tensors(config)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for whole, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            stem = whole.partition(".")[0]
            names = [f"{layer}.{stem}.{part}_proj.weight" for part in parts]
            tensors[f"{layer}.{whole}.weight"] = torch.cat([tensors.pop(name) for name in names])
    packed, whole_tensors = quantised(tensors, FORMS[name])
    want = logits_of(load(config, whole_tensors), TOKEN_IDS)
    found = logits_of(load(config, packed, FORMS[name]), TOKEN_IDS)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-5)


def test_modules_that_are_not_quantised() -> None:
    config, form = llama_config(), FORMS["awq 64"]
    tensors = llama_tensors(config)
    packed, whole = quantised(tensors, form)
    for part in ("gate", "up"):
        name = f"model.layers.1.mlp.{part}_proj"
        packed = {n: t for n, t in packed.items() if not n.startswith(name)}
        packed[f"{name}.weight"] = whole[f"{name}.weight"] = tensors[f"{name}.weight"]
    ignoring = form._replace(
        config=form.config | {"modules_to_not_convert": ["layers.1.mlp.gate_proj", "1.mlp.up_proj"]}
    )
    found = logits_of(load(config, packed, ignoring), TOKEN_IDS)
    torch.testing.assert_close(found, logits_of(load(config, whole), TOKEN_IDS), atol=1e-4, rtol=1e-5)
    half = form._replace(config=form.config | {"modules_to_not_convert": ["layers.1.mlp.gate_proj"]})
    with pytest.raises(
        ValueError, match=r"gate_proj, model.*up_proj are one matrix here, and the checkpoint quantises"
    ):
        load(config, packed, half)


def test_scales_of_kv_and_biases_of_zero_are_passed_over() -> None:
    config, form = llama_config(), FORMS["gptq 32"]
    packed, whole = quantised(llama_tensors(config), form)
    packed["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)
    packed["model.layers.0.mlp.down_proj.bias"] = torch.zeros(128)
    found = logits_of(load(config, packed, form), TOKEN_IDS)
    torch.testing.assert_close(found, logits_of(load(config, whole), TOKEN_IDS), atol=1e-4, rtol=1e-5)
    packed["model.layers.0.mlp.down_proj.bias"] = torch.ones(128)
    with pytest.raises(StartupError, match=r"has a tensor 'model\.layers\.0\.mlp\.down_proj\.bias' that this arch"):
        load(config, packed, form)


SPLIT = [name for name in FORMS if name not in ("gptq act-order", "awq 128", "gptq 128", "pack 128")]


@pytest.mark.parametrize("name", SPLIT)
def test_a_rank_holds_its_share(name: str) -> None:
    """The shares of two ranks, put together, are the whole matrices."""
    form = FORMS[name]
    quantization = quantization_of(form.config, None, "the test")
    assert quantization is not None
    scheme = scheme_of(quantization.format_of(["x"]))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    parts = {"q": 512, "k": 256}
    packed = {part: form.pack(torch.randn(size, 128, generator=generator)) for part, size in parts.items()}
    row = form.pack(torch.randn(24, 512, generator=generator))
    columns, rows = [], []
    for rank in range(2):
        tp = TensorParallelGroup(rank, 2)
        layer = MergedColumnParallelLinear(128, parts, frozenset(), tp, Dequantised(scheme, Unquantized()))
        for part in parts:
            for kind, tensor in packed[part].tensors.items():
                layer.load((part,), kind, tensor)
        layer.finish()
        columns.append(layer.weight.split([256, 128]))
        last = RowParallelLinear(512, 24, False, tp, Dequantised(scheme, Unquantized()))
        for kind, tensor in row.tensors.items():
            last.load(("o",), kind, tensor)
        last.finish()
        rows.append(last.weight)
    for i, part in enumerate(parts):
        torch.testing.assert_close(torch.cat([shares[i] for shares in columns]), packed[part].matrix)
    torch.testing.assert_close(torch.cat(rows, 1), row.matrix)


def test_what_cannot_be_split_over_ranks() -> None:
    def row_layer(form: Form, features: int) -> None:
        quantization = quantization_of(form.config, None, "the test")
        method = Dequantised(scheme_of(quantization.format_of(["x"])), Unquantized())  # type: ignore[union-attr,arg-type]
        layer = RowParallelLinear(features, 8, False, TensorParallelGroup(1, 2), method)
        for kind, tensor in form.pack(torch.randn(8, features)).tensors.items():
            layer.load((), kind, tensor)
        layer.finish()

    with pytest.raises(ValueError, match=r"has an entry for 128 features, which do not divide 64"):
        row_layer(awq(128), 128)
    with pytest.raises(ValueError, match="activation order cannot be split over tensor-parallel ranks"):
        row_layer(gptq(32, act_order=True), 128)
    with pytest.raises(ValueError, match="do not divide the 192 of a rank; use fewer tensor-parallel ranks"):
        row_layer(FORMS["fp8 block"], 384)


def test_wrong_tensors_are_named() -> None:
    config, form = llama_config(), FORMS["fp8 channel"]
    packed, _ = quantised(llama_tensors(config), form)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    with pytest.raises(StartupError, match=rf"lacks 1 tensors, among them {name}"):
        load(config, {n: t for n, t in packed.items() if n != name}, form)
    with pytest.raises(StartupError, match=rf"{name} does not fit its configuration: up.weight_scale has shape"):
        load(config, packed | {name: torch.ones(3, 1)}, form)
    weight = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(StartupError, match=r"up.weight has dtype bfloat16, expected float8_e4m3fn"):
        load(config, packed | {weight: torch.ones(384, 128, dtype=torch.bfloat16)}, form)
    with pytest.raises(StartupError, match=r"layers\.1\.ffn\.gate_up cannot be used: weight_scale holds numbers that"):
        load(config, packed | {name: torch.full((384, 1), torch.nan)}, form)
    with pytest.raises(StartupError, match=r"q.weight has dtype float8_e4m3fn, expected float32"):
        load(config, packed)


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"layer 0: .*has an entry for 128 features, which do not divide 192"):
        load(llama_config(hidden_size=192), {}, FORMS["pack 128"])


@pytest.mark.parametrize(
    ("values", "asked", "words"),
    [
        ({"quant_method": "bitsandbytes"}, None, "quantised by 'bitsandbytes'; supported are fp8, awq, gptq"),
        ({"quant_method": "awq", "bits": 8}, None, "bits is 8; supported: 4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 48}, None, "group_size is 48; supported: 32, 64, 128"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"a": {}}}, None, "dynamic .* is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, None, r"weight_block_size is \[64, 64\]; supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, None, "fmt is 'e5m2'"),
        ({"quant_method": "fp8"}, "awq", "--quantization awq contradicts m, which is quantised by 'fp8'"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            None,
            "quant_algo is 'W4A8_AWQ'; supported: 'NVFP4', 'FP8'",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None, "config_groups is empty"),
        (None, "awq", "--quantization awq needs a checkpoint that is quantised so"),
    ],
)
def test_what_is_not_understood_is_one_line(values: dict[str, Any] | None, asked: str | None, words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        quantization_of(values, asked, "m")
    assert "\n" not in str(caught.value)


def test_names_of_vllm() -> None:
    assert [method_name(n) for n in ("awq_marlin", "gptq_marlin", "fp8", "none", None)] == [
        "awq",
        "gptq",
        "fp8",
        None,
        None,
    ]
    found = quantization_of(FORMS["awq 64"].config, method_name("awq_marlin"), "m")
    assert found is not None and found.method == "awq"


@pytest.mark.parametrize(
    "name", ["fp8 block", "awq 64", "gptq act-order", "pack asymmetric 128", "int8", "nvfp4 modelopt"]
)
def test_engine_tokens_are_those_of_the_dequantised_checkpoint(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Through the loader, with the compiled CPU kernels where they are built."""
    values = json.loads((tiny_model_dir / "config.json").read_text())
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32}
    config = llama_config(**sizes, vocab_size=values["vocab_size"], num_key_value_heads=2)
    packed, whole = quantised(llama_tensors(config), FORMS[name])
    found = []
    for folder, tensors, more in (("q", packed, {"quantization_config": FORMS[name].config}), ("w", whole, {})):
        (tmp_path / folder).mkdir()
        for file in tiny_model_dir.glob("*token*"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
        (tmp_path / folder / "config.json").write_text(json.dumps(values | sizes | more))
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        engine = make_engine(tmp_path / folder)
        found.append(tokens(run(engine, [Request(list(range(5, 30))), Request([9, 8, 7])], greedy(8))))
        engine.shutdown()
    assert found[0] == found[1]
