"""Environment variables that hold what they should not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm import envs
from vllm.exceptions import StartupError


@pytest.mark.parametrize("value", ["abc", "-1", "nan", "1e99"])
def test_a_number_that_is_none_is_named(monkeypatch, value):
    for name, read, least in (
        ("VLLM_ENGINE_READY_TIMEOUT_S", envs.engine_ready_timeout_s, 1),
        ("VLLM_EXECUTE_MODEL_TIMEOUT_S", envs.execute_model_timeout_s, 1),
        ("VLLM_CPU_KVCACHE_SPACE", envs.cpu_kvcache_space_gib, 0),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(StartupError, match=rf"{name} must be a number from {least} to 1000000000, got '{value}'"):
            read()


@pytest.mark.parametrize("value", ["0", "0.5"])
def test_the_engine_has_at_least_a_second(monkeypatch, value):
    monkeypatch.setenv("VLLM_ENGINE_READY_TIMEOUT_S", value)
    with pytest.raises(StartupError, match=rf"from 1 to 1000000000, got '{value}'"):
        envs.engine_ready_timeout_s()


def test_numbers_and_their_defaults(monkeypatch):
    monkeypatch.delenv("VLLM_ENGINE_READY_TIMEOUT_S", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0")
    assert (envs.engine_ready_timeout_s(), envs.cpu_kvcache_space_gib()) == (600, None)
    monkeypatch.setenv("VLLM_ENGINE_READY_TIMEOUT_S", "30")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0.5")
    assert (envs.engine_ready_timeout_s(), envs.cpu_kvcache_space_gib()) == (30, 0.5)


def test_an_unknown_log_level_is_said(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "loud")
    code = "from vllm.logger import init_logger; init_logger('vllm.x').info('still here')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "VLLM_LOGGING_LEVEL is LOUD" in done.stderr
    assert "still here" in done.stderr
