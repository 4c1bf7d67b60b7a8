"""Processes of the product that start with all that they import already loaded.

To load torch and transformers takes several seconds of a processor, which every server, engine and compiler of a test
run would spend anew. A process that has loaded them once (the nursery) forks instead. `nursery.command(module)` is what
stands in place of `python -m module`: a small process that has its standard streams, its environment and its signals
passed on to such a fork, and that ends as the fork ends. If it is killed, so is the fork.

Not for tests of the start itself, nor for those that look for a process by its id: the fork has another one.

    python warm_start.py SOCKET MODULE ARG…      runs `main()` of the module as a fork of the nursery at SOCKET
    python warm_start.py SOCKET                  is the nursery, until its standard input ends
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

_MODULES = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.engine.core_process",
    "vllm.structured_output.compile_server",
    "vllm.executor.rank_process",
)
_LENGTH = struct.Struct("!I")
_ENDED = struct.Struct("!i")
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Nursery:
    """The process that forks, as seen from the tests.

    Args:
        folder: Its socket and its log are put there.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "nursery.sock"
        root = Path(__file__).resolve().parent.parent
        # Threads do not survive a fork.
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        with (folder / "nursery.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )

    def command(self, module: str) -> list[str]:
        """What `python -m module` is replaced by; arguments go behind it."""
        # Without site packages it starts in some hundredths of a second.
        return [sys.executable, "-I", "-S", __file__, str(self._path), module]

    def stop(self) -> None:
        """Returns when all forks have ended, which whoever started them sees to."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


# The small process ---------------------------------------------------------------------------------------------------


def stand_in(path: str, module: str, args: list[str]) -> None:
    with _connected(path) as connection:
        words = {"module": module, "args": args, "env": dict(os.environ), "cwd": os.getcwd(), "nursery": path}
        message = json.dumps(words).encode()
        socket.send_fds(connection, [_LENGTH.pack(len(message))], [0, 1, 2])
        connection.sendall(message)
        # Whoever is at the other end of our streams is to notice when the fork ends.
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        for sig in _FORWARDED:
            signal.signal(sig, lambda number, frame: connection.sendall(bytes([number])))
        answer = connection.recv(_ENDED.size, socket.MSG_WAITALL)
    code = _ENDED.unpack(answer)[0] if len(answer) == _ENDED.size else 1
    if code < 0:
        with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler that could be set.
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _connected(path: str) -> socket.socket:
    """A connection to the nursery, which may be loading yet."""
    import time

    for _ in range(1200):
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(path)
            return connection
        connection.close()
        time.sleep(0.1)
    sys.exit(f"error: nothing listens at {path}; see nursery.log beside it")


# The nursery ---------------------------------------------------------------------------------------------------------


def serve(path: str) -> None:
    """Forks for whoever connects. Returns in the forks, which have their streams, environment and arguments by then."""
    import gc
    import importlib
    import select

    for module in _MODULES:
        importlib.import_module(module)
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads != 1:
        sys.exit(f"error: importing has started {num_threads - 1} threads, which forks would not have")
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            ready, _, _ = select.select([sys.stdin, listener], [], [])
            # What they have used of the processor shows as ours only if somebody waits for them.
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, 0 if sys.stdin in ready else os.WNOHANG)[0]:
                    pass
            if sys.stdin in ready:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                break
            connection.close()
    _keep(connection)


def _keep(connection: socket.socket) -> None:
    """Forks once more, and tells the small process how that ended; returns in the fork."""
    import select

    head, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    message = connection.recv(_LENGTH.unpack(head)[0], socket.MSG_WAITALL)
    words = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(words["env"])
        os.chdir(words["cwd"])
        sys.argv = [words["module"], *words["args"]]
        return
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):
                connection.sendall(_ENDED.pack(code))
            os._exit(0)
        sent = connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            if sent:
                os.kill(pid, sent[0])
            else:
                os.killpg(pid, signal.SIGKILL)
                os._exit(0)


def run(path: str) -> None:
    """Runs what a fork is for; its own engines and compilers are forks of the same nursery."""
    import importlib

    module = importlib.import_module(sys.argv[0])
    nursery = [sys.executable, "-I", "-S", __file__, path]
    from vllm.engine.async_llm_engine import AsyncLLMEngine
    from vllm.structured_output.compiler import ConstraintCompiler

    AsyncLLMEngine.process_command = [*nursery, "vllm.engine.core_process"]
    ConstraintCompiler.process_command = [*nursery, "vllm.structured_output.compile_server"]
    module.main()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        stand_in(sys.argv[1], sys.argv[2], sys.argv[3:])
    socket_path = sys.argv[1]
    serve(socket_path)
    run(socket_path)
