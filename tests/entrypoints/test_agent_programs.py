"""Agents' own programs, each in one turn against the real server; skipped where they are not installed.

A tiny random model answers. What it says is noise, so only the ways of the two programs are tested.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from server_process import ServerProcess

pytestmark = pytest.mark.nightly

# Their own prompts and tools take some 30,000 tokens of this tokenizer.
CONTEXT = 131_072


@pytest.fixture(scope="module")
def long_server(server_factory: Callable[..., ServerProcess], tiny_model_dir: Path) -> ServerProcess:
    # Or the answers would go on to the end of the context.
    ends = list(range(0, 49_152, 8))
    return server_factory(
        *("--model", str(tiny_model_dir), "--served-model-name", "tiny"),
        *(
            "--hf-overrides",
            json.dumps({"max_position_embeddings": CONTEXT, "eos_token_id": ends}),
        ),
        *("--max-model-len", str(CONTEXT), "--num-gpu-blocks-override", str(2 * CONTEXT // 16)),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-log-requests"),
    )


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(command[0]).parent}:/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(
        command,
        env={"PATH": path, "HOME": str(folder)} | env,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def answers(server: ServerProcess, path: str) -> list[str]:
    """Statuses of what was asked of a route."""
    return re.findall(rf'"POST {path}\S* HTTP/1.1" (\d+)', server.log_path.read_text())


def test_claude_code_takes_a_turn(long_server: ServerProcess, tmp_path: Path) -> None:
    done = run(
        [program("claude"), "-p", "Say hello.", "--output-format", "json", "--max-turns", "1"],
        tmp_path,
        ANTHROPIC_BASE_URL=long_server.url,
        ANTHROPIC_AUTH_TOKEN="EMPTY",
        ANTHROPIC_MODEL="tiny",
        ANTHROPIC_SMALL_FAST_MODEL="tiny",
        CLAUDE_CODE_MAX_OUTPUT_TOKENS="64",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
    )
    statuses = answers(long_server, "/v1/messages")
    assert statuses and set(statuses) == {"200"}, (statuses, done.stdout, done.stderr)
    assert '"usage"' in done.stdout, (done.stdout, done.stderr)


def test_codex_takes_a_turn(long_server: ServerProcess, tmp_path: Path) -> None:
    config = tmp_path / ".codex"
    config.mkdir()
    config.joinpath("config.toml").write_text(
        'model = "tiny"\nmodel_provider = "here"\nsandbox_mode = "read-only"\n'
        f'[model_providers.here]\nname = "here"\nbase_url = "{long_server.url}/v1"\nwire_api = "responses"\n'
    )
    done = run(
        [program("codex"), "exec", "--skip-git-repo-check", "--json", "Say hello."],
        tmp_path,
        CODEX_HOME=str(config),
    )
    statuses = answers(long_server, "/v1/responses")
    assert statuses and set(statuses) == {"200"}, (statuses, done.stdout[-2000:], done.stderr[-2000:])
    assert "turn.completed" in done.stdout, (done.stdout[-2000:], done.stderr[-2000:])
