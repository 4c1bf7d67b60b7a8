"""Linear layers whose weights stay quantised, from the checkpoint's tensors to the product."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE, assert_near, randn
from tests.model_executor.quantized_checkpoints import FORMS
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.layernorm import RowNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.select import linear_method
from vllm.model_executor.layers.quantization.unquantized import Unquantized
from vllm.ops.norm import Norm
from vllm.transformers_utils.quantization_config import Fp8Format, quantization_of

PARTS = {"q": 48, "k": 32, "v": 32}
FEATURES = 384
DAILY = (
    "fp8 tensor",
    "fp8 block",
    "int8",
    "mxfp4",
    "nvfp4",
    "awq 64",
    "gptq act-order",
    "pack asymmetric 128",
    "pack -1",
)


@pytest.fixture
def bfloat16() -> object:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.nightly) for name in FORMS]
)
def test_products_are_those_of_the_dequantised_matrices(name: str) -> None:
    form = FORMS[name]
    quantization = quantization_of(form.config, None, "the test")
    assert quantization is not None
    method = linear_method(quantization.format_of(["x"]), Unquantized(), kernels=True)
    packed = {
        part: form.pack(randn(rows, FEATURES, seed=i).cpu() * (i + 1)) for i, (part, rows) in enumerate(PARTS.items())
    }
    with torch.device(DEVICE):
        layer = MergedColumnParallelLinear(FEATURES, PARTS, frozenset("k"), TensorParallelGroup(), method)
        norm = RowNorm(FEATURES, Norm(1e-5))
        norm.weight.fill_(1.0)
    for part, (tensors, _) in packed.items():
        for kind, tensor in tensors.items():
            layer.load((part,), kind, tensor)
    bias = randn(32, dtype=torch.bfloat16, seed=7)
    layer.load(("k",), "bias", bias.cpu())
    layer.finish()
    assert layer.matrix is not None and not list(layer.parameters())[1:]
    matrix = torch.cat([whole for _, whole in packed.values()]).double().to(DEVICE)
    for tokens in (1, 5):
        x = randn(tokens, FEATURES, dtype=torch.bfloat16, seed=9)
        want = norm(x).double() @ matrix.T
        want[:, 48:80] += bias.double()
        # Inputs are quantised with the weights where these have 8 bits.
        bound = 0.04 if tokens > 1 and ("8" in name.split()[0]) else 0.012
        assert_near(layer(method.normalised(layer, x, norm)), want, bound)


@pytest.mark.usefixtures("bfloat16")
def test_whole_weights_become_8_bit_floats_as_they_are_loaded() -> None:
    method = linear_method(Fp8Format("channel", at_load=True), Unquantized(), kernels=True)
    with torch.device(DEVICE):
        layer = RowParallelLinear(FEATURES, 64, False, TensorParallelGroup(), method)
    weight = randn(64, FEATURES, dtype=torch.bfloat16)
    layer.load((), "weight", weight.cpu())
    with pytest.raises(ValueError, match=r"weight has shape \(64, 200\), expected 384 columns"):
        layer.load((), "weight", weight.cpu()[:, :200])
    layer.finish()
    x, residual = (randn(3, size, dtype=torch.bfloat16, seed=size) for size in (2 * FEATURES, 64))
    gate, up = x.chunk(2, dim=-1)
    want = residual.double() + (torch.nn.functional.silu(gate.double()) * up.double()) @ weight.double().T
    assert_near(layer(method.activated(layer, x, "silu", True), residual), want, 0.05)
