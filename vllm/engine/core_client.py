"""One engine process, as seen from the process that starts it: how it is started, spoken to and ended."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from vllm import envs
from vllm.child_process import child_environment
from vllm.engine.messages import CoreProcessArgs, EngineInput, EngineReady, StepOutputs
from vllm.exceptions import StartupError
from vllm.wire import to_wire

_ENCODER = msgspec.msgpack.Encoder(enc_hook=to_wire)


class CoreClient:
    """An engine process and sockets of its own: what was meant for one that has died never reaches the next.

    Args:
        command: Starts the process, which takes its arguments from standard input.
        make_args: The arguments, given the addresses of its input and its output.
        folder: Where the sockets are; who may enter it may speak to the process.
        name: Of this process among those that use the folder.
        environment: Variables of the process beside those of this one.
    """

    def __init__(
        self,
        command: Sequence[str],
        make_args: Callable[[str, str], CoreProcessArgs],
        context: zmq.asyncio.Context,
        folder: Path,
        name: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._decoder = msgspec.msgpack.Decoder(StepOutputs)
        addresses = [f"ipc://{folder / f'{direction}{name}'}" for direction in ("in", "out")]
        self._inputs = _bind(context, zmq.PUSH, addresses[0])
        self._outputs = _bind(context, zmq.PULL, addresses[1])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=child_environment(environment),
        )
        if self.process.stdin is None:
            raise RuntimeError("the engine process has no standard input")
        self.process.stdin.write(make_args(*addresses).to_line())
        self.process.stdin.flush()

    def wait_until_ready(self, is_stopped: Callable[[], bool]) -> EngineReady:
        """Blocks until the process can serve.

        Args:
            is_stopped: Whether nobody waits for it any more.

        Raises:
            StartupError: it cannot, or does not say so in time.
        """
        timeout = envs.engine_ready_timeout_s()
        deadline = time.monotonic() + timeout
        socket: zmq.Socket[bytes] = zmq.Socket.shadow(self._outputs.underlying)
        while not socket.poll(100):
            if is_stopped():
                raise StartupError("The server was stopped while the engine was loading.")
            if self.process.poll() is not None:
                code = self.process.returncode
                why = "the machine may have too little memory for this model" if code < 0 else "the lines above say why"
                raise StartupError(f"The engine process ended with code {code} while it was loading; {why}.")
            if time.monotonic() > deadline:
                raise StartupError(f"The engine was not ready after {timeout} s (VLLM_ENGINE_READY_TIMEOUT_S).")
        ready = msgspec.msgpack.decode(socket.recv(), type=EngineReady)
        if ready.error is not None:
            raise StartupError(ready.error)
        return ready

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    async def send(self, message: EngineInput) -> None:
        await self._inputs.send(_ENCODER.encode(message))

    async def receive(self) -> StepOutputs:
        """The next news.

        Raises:
            msgspec.DecodeError: they cannot be read.
        """
        return self._decoder.decode(await self._outputs.recv())

    def stop(self, grace_s: float) -> None:
        """Ends the process: asks it to, and kills it if it has not ended within `grace_s` seconds."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Closes the sockets."""
        self._inputs.close()
        self._outputs.close()


def _bind(context: zmq.asyncio.Context, kind: int, address: str) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(address)
    return socket
