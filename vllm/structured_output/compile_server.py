"""The process that compiles constraints, each in a child of its own: `python -m vllm.structured_output.compile_server`.

Whoever writes a schema or a regular expression decides what compiling it costs. A child forked for it shares the
vocabulary with this process, has a limit of CPU time, memory and wall time, and may be killed at any moment.

Jobs come on standard input and results go to standard output (`messages`). The end of standard input ends the process.
"""

from __future__ import annotations

import os
import random
import re
import resource
import selectors
import signal
import sys
import time
from collections import deque
from typing import BinaryIO

import msgspec
import numpy as np

from vllm.structured_output.grammars import Grammar
from vllm.structured_output.matcher import TokenMatcher
from vllm.structured_output.messages import LENGTH, CompileJob, CompileResult, CompileServerArgs, write_frame
from vllm.structured_output.sources import compile_source
from vllm.structured_output.vocabulary import Vocabulary
from vllm.transformers_utils.tokenizer import load_tokenizer

MAX_CPU_S = 4
# Only for what hangs: on a busy machine, work that is allowed takes many times its CPU time.
MAX_WALL_S = 60.0
MAX_MEMORY_BYTES = 2**30
MAX_DATA_BYTES = 16 * 2**20
# Requests go first.
_NICE = 10
# Outputs that are tried on a grammar: how many, and how long.
_PROBES = 2
_PROBE_TOKENS = 96
_MAX_REASON_CHARS = 300
_MAX_FRAMES = 20_000


class CompileServer:
    """Runs jobs, as many at a time as the machine can spare cores."""

    def __init__(self, vocabulary: Vocabulary, args: CompileServerArgs) -> None:
        self._vocabulary = vocabulary
        self._args = args
        self._most = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._waiting: deque[CompileJob] = deque()
        self._running: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._input = bytearray()
        self.out: BinaryIO = sys.stdout.buffer

    def run(self) -> None:
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ)
        while self.step():
            pass
        self._kill_all()

    def step(self) -> bool:
        """Waits for something to happen and does what follows; returns whether more jobs may come."""
        timeout = min((child.deadline for child in self._running.values()), default=None)
        wait = None if timeout is None else max(0.0, timeout - time.monotonic())
        for key, _ in self._selector.select(wait):
            if key.fd != 0:
                self._read_child(self._running[key.fd])
            elif not self._read_jobs():
                return False
        for child in [c for c in self._running.values() if c.deadline <= time.monotonic()]:
            child.has_hung = True
            child.kill()
            self._finish(child)
        while self._waiting and len(self._running) < self._most:
            self._start(self._waiting.popleft())
        return True

    def _read_jobs(self) -> bool:
        """Takes in what has come; returns whether more may come."""
        data = os.read(0, 2**16)
        self._input += data
        while len(self._input) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._input)[0]
            if len(self._input) < end:
                break
            self._waiting.append(msgspec.msgpack.decode(bytes(self._input[LENGTH.size : end]), type=CompileJob))
            del self._input[:end]
        return bool(data)

    def _start(self, job: CompileJob) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _run_child(job, self._vocabulary, self._args, writer)
        os.close(writer)
        self._running[reader] = _Child(job.id, pid, reader)
        self._selector.register(reader, selectors.EVENT_READ)

    def _read_child(self, child: _Child) -> None:
        data = os.read(child.fd, 2**20)
        child.output += data
        if not data:
            self._finish(child)

    def _finish(self, child: _Child) -> None:
        self._selector.unregister(child.fd)
        os.close(child.fd)
        del self._running[child.fd]
        _, status = os.waitpid(child.pid, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            message = bytes(child.output)
        else:
            result = CompileResult(child.id, error=_why_killed(status), is_busy=child.has_hung)
            message = msgspec.msgpack.encode(result)
        write_frame(self.out, message)

    def _kill_all(self) -> None:
        for child in self._running.values():
            child.kill()


class _Child:
    def __init__(self, id: int, pid: int, fd: int) -> None:
        self.id = id
        self.pid = pid
        self.fd = fd
        self.output = bytearray()
        self.has_hung = False
        self.deadline = time.monotonic() + MAX_WALL_S

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _why_killed(status: int) -> str:
    if os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, -signal.SIGXCPU):
        return f"takes more than {MAX_CPU_S} seconds of computing to compile; simplify it"
    return "needs too much memory, or nests too deeply, to be compiled; simplify it"


def _run_child(job: CompileJob, vocabulary: Vocabulary, args: CompileServerArgs, writer: int) -> None:
    """Compiles, writes the result, and ends the process."""
    code = 1
    try:
        # The compiler warns on stderr of what it ignores; what users write is no business of the server's log.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
        most = _virtual_memory_bytes() + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with open(writer, "wb") as stream:
            stream.write(msgspec.msgpack.encode(_result(job, vocabulary, args)))
        code = 0
    finally:
        os._exit(code)


def _virtual_memory_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _result(job: CompileJob, vocabulary: Vocabulary, args: CompileServerArgs) -> CompileResult:
    try:
        engine, grammar, data = compile_source(job.source, vocabulary, args.backend)
        error = _probe(grammar, vocabulary)
        if error is not None:
            return CompileResult(job.id, error=error)
    except RuntimeError as exc:
        if "bad_alloc" in str(exc):
            raise MemoryError from None
        return CompileResult(job.id, error=_explain(exc))
    except ValueError as exc:
        return CompileResult(job.id, error=f"{' '.join(str(exc).split()):.{_MAX_REASON_CHARS}}")
    if len(data) > MAX_DATA_BYTES:
        return CompileResult(job.id, error="is too large when compiled; simplify it")
    return CompileResult(job.id, data=data, engine=engine)


def _probe(grammar: Grammar, vocabulary: Vocabulary) -> str | None:
    """Follows some outputs through a grammar; returns what is wrong with it, if anything is.

    One output takes the lowest token id each time (in most vocabularies single characters, which make ambiguous
    grammars grow the fastest), the others any.
    """
    bitmask = np.empty((1, -(-vocabulary.size // 32)), np.int32)
    draw = random.Random(0)
    stops = set(vocabulary.stop_token_ids)
    for probe in range(_PROBES):
        matcher = TokenMatcher(grammar)
        for step in range(_PROBE_TOKENS):
            matcher.fill(bitmask, 0)
            allowed = np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little"))
            if not len(allowed) and not step and not matcher.error:
                return "allows no output at all"
            going_on = [int(t) for t in allowed[:16] if int(t) not in stops] if probe == 0 else []
            matcher.accept(going_on[0] if going_on else int(draw.choice(allowed)))
            if matcher.error is not None:
                return matcher.error
            if matcher.ended:
                break
    return None


def _explain(error: RuntimeError) -> str:
    """What xgrammar says, without the time and its source file."""
    text = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).strip()
    text = re.sub(r"^Check failed: .*? is false: ", "", text)
    return f"is not valid: {' '.join(text.split()):.{_MAX_REASON_CHARS}}"


def main() -> None:
    # The parent decides when to stop; signals to the whole group are its business.
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)
    os.nice(_NICE)
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    args = msgspec.json.decode(line, type=CompileServerArgs)
    tokenizer = load_tokenizer(args.tokenizer_path, args.trust_remote_code)
    vocabulary = Vocabulary.of(tokenizer, args.vocab_size, args.stop_token_ids)
    # Made once here, for all children.
    _ = vocabulary.for_xgrammar, vocabulary.stop_token_ids and vocabulary.for_llguidance
    # A schema may nest deeper than Python's functions usually do.
    sys.setrecursionlimit(_MAX_FRAMES)
    CompileServer(vocabulary, args).run()


if __name__ == "__main__":
    main()
