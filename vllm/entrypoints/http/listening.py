"""The socket that the server listens on: a TCP port, or a path in the file system."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Generator
from pathlib import Path

from vllm.exceptions import StartupError

_LISTEN_BACKLOG = 2048


@contextlib.contextmanager
def listening_socket(args: argparse.Namespace) -> Generator[socket.socket, None, None]:
    """The socket of `--uds`, or of `--host` and `--port`, bound; closed in the end, and its file removed."""
    with bind_socket(args.host, args.port) if args.uds is None else unix_socket(args.uds) as sock:
        yield sock


@contextlib.contextmanager
def unix_socket(path: str) -> Generator[socket.socket, None, None]:
    """A socket bound to a path, where a server that is gone may have left one; closed in the end, and its file removed.

    PATH.lock is locked meanwhile: before it listens, a live socket looks like one that was left behind.

    Raises:
        StartupError: another server has the path, or no socket can be made there.
    """
    with contextlib.ExitStack() as cleanup:
        try:
            _lock(f"{path}.lock", cleanup)
            if Path(path).is_socket():
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    if probe.connect_ex(path) == 0:
                        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
                Path(path).unlink()
            sock = cleanup.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.bind(path)
            cleanup.callback(_unlink_own, path, os.lstat(path))
        except OSError as exc:
            raise _cannot_listen(exc, uds=path) from None
        yield sock


def _lock(path: str, cleanup: contextlib.ExitStack) -> None:
    """Makes and locks a file; `cleanup` removes it.

    Raises:
        OSError: EADDRINUSE if another process has locked it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed it in the meantime; then the lock is on a file that nobody else sees.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.lstat(path)):
                    cleanup.callback(os.close, file)
                    cleanup.callback(_unlink_own, path, os.fstat(file))
                    return
        except BlockingIOError:
            os.close(file)
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _unlink_own(path: str, made: os.stat_result) -> None:
    """Removes a file unless another one has taken its place."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(path), made):
            os.unlink(path)


def bind_socket(host: str | None, port: int) -> socket.socket:
    """A TCP socket bound to the address; it does not listen yet.

    Raises:
        StartupError: the address is in use, or is not one of this machine's.
    """
    host = host or "0.0.0.0"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise StartupError(f"Cannot listen on {host}: {exc.strerror}.") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
    except OSError as exc:
        sock.close()
        raise _cannot_listen(exc, host, port) from None
    return sock


def _cannot_listen(exc: OSError, host: str = "", port: int = 0, *, uds: str | None = None) -> StartupError:
    where, advice = f"{host} port {port}", "Choose another with --host and --port."
    if uds is not None:
        where, advice = f"--uds {uds}", "Choose another path."
    return StartupError(f"Cannot listen on {where}: {exc.strerror or exc}. {advice}")


def listen(sock: socket.socket, uds: str | None) -> None:
    """Lets clients connect to a bound socket, which is `uds` or a TCP one.

    Raises:
        StartupError: another server listens there already.
    """
    try:
        # Another server may have bound the port while the model loaded; only one can listen.
        sock.listen(_LISTEN_BACKLOG)
    except OSError as exc:
        host, port = ("", 0) if uds is not None else sock.getsockname()[:2]
        raise _cannot_listen(exc, host, port, uds=uds) from None
