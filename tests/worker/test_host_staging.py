"""Small arrays on their way to a device: what arrives is what was handed over, however the memory between is reused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm.ops.staging import HostStaging, reserve, to_device, write

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", [np.arange(12).reshape(3, 4), np.array([], np.int64), np.array([7], np.int32)])
def test_an_array_arrives(values: np.ndarray, device: str) -> None:
    out = to_device(values, torch.device(device))
    assert out.device.type == device
    assert out.cpu().numpy().dtype == values.dtype
    np.testing.assert_array_equal(out.cpu().numpy(), values)


@pytest.mark.parametrize("device", DEVICES)
def test_an_array_is_written_into_a_part_of_a_row(device: str) -> None:
    table = torch.full((3, 5), -1, device=device)
    write(table[1, 2:4], np.array([8, 9]))
    assert table.tolist() == [[-1] * 5, [-1, -1, 8, 9, -1], [-1] * 5]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_was_reserved_holds_what_is_written_to_it(device: str) -> None:
    array, tensor = reserve(6, np.int32, torch.device(device))
    array[:] = [1, 0, 2, 0, 3, 0]
    assert tensor.tolist() == [1, 0, 2, 0, 3, 0]
    # Numbers of twice the size fit in it as well.
    assert array.view(np.int64).tolist() == [1, 2, 3]
    assert tensor.to(device).view(torch.int64).tolist() == [1, 2, 3]


@pytest.mark.gpu
def test_memory_is_not_written_again_before_it_has_been_copied() -> None:
    staging = HostStaging(num_bytes=256)
    sizes = [1, 5, 31, 3, 32, 40, 2] * 20
    # The device is kept busy, so that copies lag behind the host by as much as they may.
    torch.cuda._sleep(20_000_000)
    sent = [staging.stage(np.full(n, i)).to("cuda", non_blocking=True) for i, n in enumerate(sizes)]
    for i, (n, tensor) in enumerate(zip(sizes, sent, strict=True)):
        assert tensor.tolist() == [i] * n
