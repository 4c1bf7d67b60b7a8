"""Client of the process that compiles constraints: starts it, asks it, remembers what it answered."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import BinaryIO, ClassVar, cast

import msgspec

from vllm.child_process import child_environment
from vllm.config import ModelConfig
from vllm.exceptions import ServerBusyError, VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import StructuredOutputsParams
from vllm.structured_output.constraint import CompiledConstraint, constraint_key, constraint_source
from vllm.structured_output.messages import CompileJob, CompileResult, CompileServerArgs, read_frame, write_frame

logger = init_logger(__name__)

_CACHE_BYTES = 64 * 2**20
_CACHE_ENTRIES = 4096
_MAX_PENDING = 64
_STOP_GRACE_S = 5.0

Outcome = Future[CompiledConstraint]


class ConstraintCompiler:
    """Compiles constraints outside this process. Safe to use from several threads.

    The process starts with the first constraint. What came of one is remembered, errors too, so that a costly one is
    tried once; the least recently used is forgotten.

    Args:
        config: Whose tokenizer and vocabulary.

    Attributes:
        process_command: Starts the process, which takes its arguments and its jobs from standard input.
    """

    process_command: ClassVar[Sequence[str]] = (sys.executable, "-m", "vllm.structured_output.compile_server")

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs: queue.SimpleQueue[CompileJob | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._results: OrderedDict[bytes, Outcome] = OrderedDict()
        self._sizes: dict[bytes, int] = {}
        self._pending: dict[int, tuple[bytes, Outcome]] = {}
        self._next_id = 0
        self._closed = False

    def compile(self, params: StructuredOutputsParams) -> Outcome:
        """The compiled constraint, once it is there. The future may be shared: it must not be cancelled.

        Raises (at once or from the future):
            VLLMValidationError: it is malformed or costs too much.
            ServerBusyError: too many are being compiled.
        """
        source = constraint_source(params)
        key = constraint_key(source)
        with self._lock:
            if self._closed:
                raise ServerBusyError("The server is being stopped.")
            known = self._results.get(key)
            if known is not None:
                self._results.move_to_end(key)
                return known
            for pending_key, outcome in self._pending.values():
                if pending_key == key:
                    return outcome
            if len(self._pending) >= _MAX_PENDING:
                raise ServerBusyError("Too many structured outputs are being compiled; try again in a moment.")
            return self._submit(key, source)

    def refuse(self, params: StructuredOutputsParams, error: VLLMValidationError) -> None:
        """Answers a constraint that proved too costly with an error from now on."""
        outcome: Outcome = Future()
        outcome.set_exception(error)
        with self._lock:
            self._remember(constraint_key(constraint_source(params)), outcome, 0)

    def shutdown(self) -> None:
        """Ends the process; what it was compiling fails."""
        self._closed = True
        self._jobs.put(None)
        if self._writer is not None:
            self._writer.join(_STOP_GRACE_S)

    def _submit(self, key: bytes, source: bytes) -> Outcome:
        outcome: Outcome = Future()
        self._next_id += 1
        self._pending[self._next_id] = (key, outcome)
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="constraint-jobs", daemon=True)
            self._writer.start()
        self._jobs.put(CompileJob(self._next_id, source))
        return outcome

    def _write(self) -> None:
        """Hands jobs over; in a thread of its own, since a process that is just starting reads late."""
        while (job := self._jobs.get()) is not None:
            try:
                if self._process is None:
                    self._process = self._start()
                write_frame(cast(BinaryIO, self._process.stdin), msgspec.msgpack.encode(job))
            except Exception as error:  # the process ended just now, or could not be started
                with self._lock:
                    entry = self._pending.pop(job.id, None)
                if entry is not None:
                    entry[1].set_exception(_interrupted(str(error)))
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        # One thread: the process forks, and libraries' threads do not survive that.
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(
            self.process_command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(one),
        )
        config = self._config
        args = CompileServerArgs(
            config.tokenizer_path,
            config.trust_remote_code,
            config.vocab_size,
            list(config.eos_token_ids),
            config.structured_outputs_backend,
        )
        stdin = cast(BinaryIO, process.stdin)
        stdin.write(msgspec.json.encode(args) + b"\n")
        stdin.flush()
        threading.Thread(target=self._read, args=(process,), name="constraint-results", daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        try:
            self._take_in_results(cast(BinaryIO, process.stdout))
        except Exception:
            # Nobody would read what it says any more.
            logger.exception("The process that compiles structured outputs is not understood, and is ended.")
            process.kill()
        # What was handed over after it had ended is lost as well.
        with self._lock:
            failed, self._pending = list(self._pending.values()), {}
            self._process = None
        process.wait()
        if not self._closed:
            logger.error("The process that compiles structured outputs ended (code %d).", process.returncode)
        for _, outcome in failed:
            outcome.set_exception(_interrupted("the process ended"))

    def _take_in_results(self, stream: BinaryIO) -> None:
        while (frame := read_frame(stream)) is not None:
            result = msgspec.msgpack.decode(frame, type=CompileResult)
            with self._lock:
                key, outcome = self._pending.pop(result.id)
                if not result.is_busy:
                    self._remember(key, outcome, len(result.data))
            if result.is_busy:
                outcome.set_exception(_interrupted("the machine is busy"))
            elif result.error is None:
                outcome.set_result(CompiledConstraint(key, result.data, result.engine))
            else:
                outcome.set_exception(_refused(result.error))

    def _remember(self, key: bytes, outcome: Outcome, num_bytes: int) -> None:
        self._results[key] = outcome
        self._sizes[key] = num_bytes
        while len(self._results) > _CACHE_ENTRIES or sum(self._sizes.values()) > _CACHE_BYTES:
            oldest, _ = self._results.popitem(last=False)
            del self._sizes[oldest]


def _interrupted(why: str) -> ServerBusyError:
    return ServerBusyError(f"Compiling structured outputs was interrupted ({why}); try again.")


def _refused(why: str) -> VLLMValidationError:
    return VLLMValidationError(f"structured_outputs {why}.", "structured_outputs")
