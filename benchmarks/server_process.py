"""API servers as child processes, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ChildServer:
    """A server with OpenAI's API, of whichever make, as a child process that listens on 127.0.0.1.

    Args:
        command: What to run.
        port: Where it will listen.
        log_path: File that its output goes to.
        env: All of its environment variables.
        cwd: Folder it runs in; this process's own if not given.
        api_key: Key that our own requests carry; the server must be given it by flag or environment as well.

    Attributes:
        url: Base address, without a slash at the end and without `/v1`.
        process: The child, leader of a process group of its own.

    Raises:
        OSError: There is no such command.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log_path: Path,
        env: Mapping[str, str],
        cwd: Path | None = None,
        api_key: str | None = None,
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        self.api_key = api_key
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )

    def wait_until_healthy(self, timeout: float) -> None:
        """Returns when `/health` answers 200.

        Raises:
            RuntimeError: The server ended, or was not healthy within `timeout` seconds (it is stopped then).
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended with code {self.process.returncode}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (OSError, http.client.HTTPException):
                pass  # Not listening yet, or not ready: that is what we wait for.
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"The server was not healthy within {timeout:.0f} s:\n{self.log_tail()}")

    @cached_property
    def model(self) -> str:
        """Name under which the server knows its model."""
        request = urllib.request.Request(f"{self.url}/v1/models")
        if self.api_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the server's output."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, timeout: float = 30) -> int:
        """Asks the server to end, kills it after `timeout` seconds, and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):  # Raised when nothing of its process group is left.
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class ServerProcess(ChildServer):
    """`python -m vllm.entrypoints.openai.api_server` of this repository on a free port.

    Args:
        args: Its flags, without `--host` and `--port`.
        env: Environment variables on top of ours.
        command: What to run, if not the server itself.
    """

    def __init__(
        self,
        args: Sequence[str],
        log_path: Path,
        env: Mapping[str, str] | None = None,
        api_key: str | None = None,
        command: Sequence[str] = (sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
    ) -> None:
        port = free_port()
        path = os.pathsep.join([str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        super().__init__(
            [*command, "--host", "127.0.0.1", "--port", str(port), *args],
            port,
            log_path,
            {**os.environ, "PYTHONPATH": path, **(env or {})},
            api_key=api_key,
        )
