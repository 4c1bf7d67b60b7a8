"""What passes between the server and the process that compiles: MessagePack with four bytes of length before it."""

from __future__ import annotations

import struct
from typing import BinaryIO, Literal

import msgspec

from vllm.structured_output.grammars import EngineName

Backend = Literal["auto", "guidance", "xgrammar"]
"""Which engine takes JSON schemas: llguidance with xgrammar for what it does not take, or one of them alone."""

LENGTH = struct.Struct("<I")


class CompileServerArgs(msgspec.Struct):
    """First line of the compiler's standard input, as JSON; see `Vocabulary`."""

    tokenizer_path: str
    trust_remote_code: bool
    vocab_size: int
    stop_token_ids: list[int]
    backend: Backend = "auto"


class CompileJob(msgspec.Struct):
    """`source` is a `constraint_source`."""

    id: int
    source: bytes


class CompileResult(msgspec.Struct, omit_defaults=True):
    """Either `data`, the grammar as `engine` serialises it, or `error`, what is wrong with the constraint.

    `is_busy`: nothing is, there was no time for it.
    """

    id: int
    engine: EngineName = "xgrammar"
    data: bytes = b""
    error: str | None = None
    is_busy: bool = False


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return stream.read(LENGTH.unpack(head)[0])


def write_frame(stream: BinaryIO, message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()
