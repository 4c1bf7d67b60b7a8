"""What passes between the server and the process that compiles: MessagePack with four bytes of length before it."""

from __future__ import annotations

import struct
from typing import BinaryIO

import msgspec

LENGTH = struct.Struct("<I")


class CompileServerArgs(msgspec.Struct):
    """First line of the compiler's standard input, as JSON; see `tokenizer_info`."""

    tokenizer_path: str
    trust_remote_code: bool
    vocab_size: int
    stop_token_ids: list[int]


class CompileJob(msgspec.Struct):
    """`source` is a `constraint_source`."""

    id: int
    source: bytes


class CompileResult(msgspec.Struct, omit_defaults=True):
    """Either `data`, the serialised grammar, or `error`, what is wrong with the constraint."""

    id: int
    data: bytes = b""
    error: str | None = None


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return stream.read(LENGTH.unpack(head)[0])


def write_frame(stream: BinaryIO, message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()
