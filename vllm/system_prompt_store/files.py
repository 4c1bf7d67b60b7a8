"""File operations of the store: private, durable, and never following what somebody else put in the way."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

TENSORS_FILE = "kv.safetensors"
MANIFEST_FILE = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
MAX_MANIFEST_BYTES = 64 << 20

_FILE_MODE = 0o600
_FOLDER_MODE = 0o700
_PIECE_BYTES = 1 << 20


def private_folder(path: Path) -> None:
    """Makes a folder that only this user can use, if it is not there.

    Raises:
        OSError: it cannot be made, or is there and open to others.
    """
    path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} must be a directory of this user with mode 0700")


def lock(folder: Path) -> int | None:
    """An open descriptor that marks `folder` as in use until it is closed; None if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def remove(path: Path) -> None:
    """Deletes a file or folder if it is there and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a new file and makes it durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _FILE_MODE)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor to read a plain file by; anything else is refused, a link to one too.

    Raises:
        OSError: it is not there, not readable or not a plain file.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return descriptor


def read_small(path: Path) -> bytes:
    """A file of at most `MAX_MANIFEST_BYTES`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
    return data


def tensor_name(index: int, num_tensors: int, num_window_tensors: int = 0) -> str:
    """`k.0 …`, then `v.0 …`; then `window.k.0 …` and `window.v.0 …`."""
    num_full = num_tensors - num_window_tensors
    if index >= num_full:
        return f"window.{tensor_name(index - num_full, num_window_tensors)}"
    return f"k.{index}" if index < num_full // 2 else f"v.{index - num_full // 2}"


def safetensors_header(shapes: Sequence[tuple[int, int]], num_window_tensors: int = 0) -> bytes:
    """All that a safetensors file of such an image has ahead of its data.

    It follows from the shape alone, so a reader compares it and never parses what it finds.

    Args:
        shapes: Blocks, and bytes of one, of K of every layer, then of V of every layer.
        num_window_tensors: How many of them, at the end, are of the window group.
    """
    ends = list(accumulate((blocks * size for blocks, size in shapes), initial=0))
    entries = {
        tensor_name(i, len(shapes), num_window_tensors): {
            "dtype": "U8",
            "shape": list(shape),
            "data_offsets": [ends[i], ends[i + 1]],
        }
        for i, shape in enumerate(shapes)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces_of(tensor: np.ndarray) -> Iterable[memoryview]:
    """The bytes of a contiguous array, in pieces that stay in the processor's cache."""
    view = tensor.reshape(-1).data
    for start in range(0, len(view), _PIECE_BYTES):
        yield view[start : start + _PIECE_BYTES]


def read_tensor(descriptor: int, tensor: np.ndarray) -> str:
    """Fills a contiguous uint8 array from a file; returns the SHA-256 (hex) of what was read.

    Raises:
        EOFError: the file ends first.
    """
    digest = hashlib.sha256()
    for piece in pieces_of(tensor):
        rest = piece
        while rest:
            count = os.readv(descriptor, [rest])
            if not count:
                raise EOFError("the file is too short")
            rest = rest[count:]
        digest.update(piece)
    return digest.hexdigest()
