"""A folder of snapshots: one rank's K/V of pinned system prompts, each in a folder of its own.

    <folder>/<prompt id>-<identity>/kv.safetensors    K of every layer, then V, as bytes [num_blocks, block_bytes]
                                    manifest.json     identity, prompt, SHA-256 of every tensor and of itself

A snapshot is written under a temporary name, made durable and then renamed, so that it is there as a whole or not at
all. What is unknown, damaged or of another setup is a miss that is logged; nothing read from a file decides anything
before its checksum has matched.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np

from vllm.logger import init_logger
from vllm.system_prompt_store import files
from vllm.system_prompt_store.identity import SnapshotIdentity
from vllm.system_prompt_store.manifest import Manifest, SnapshotRecord

logger = init_logger(__name__)

_IDENTITY_CHARS = 16


class SnapshotOutcome(StrEnum):
    """How an operation on a snapshot ended."""

    OK = "ok"
    MISSING = "missing"
    MISMATCH = "mismatch"
    DAMAGED = "damaged"
    TOO_LARGE = "too_large"
    ERROR = "error"


class SnapshotStore:
    """The snapshots of one rank. Every method but the constructor may be called from one other thread.

    Args:
        folder: Where they are; made if it is not there. Ranks and servers may share it.
        identity: What the K/V of this rank depends on.
        max_bytes: Most bytes that all snapshots in the folder take, those of other setups too.
    """

    def __init__(self, folder: Path, identity: SnapshotIdentity, max_bytes: int) -> None:
        self.folder = folder
        self.identity = identity
        self.max_bytes = max_bytes
        self._suffix = "-" + identity.digest[:_IDENTITY_CHARS]
        self._hard: set[str] = set()

    # Looking ---------------------------------------------------------------------------------------------------

    def scan(self) -> list[SnapshotRecord]:
        """Looks through the folder: returns what it has for this identity, the last used first.

        Clears away what broken-off writes have left. Checksums of tensors are not compared yet; `read` does that.
        """
        try:
            files.private_folder(self.folder)
            entries = list(self.folder.iterdir())
        except OSError as error:
            logger.warning("No snapshots can be kept in %s: %s", self.folder, error)
            return []
        found: list[tuple[float, SnapshotRecord]] = []
        others: Counter[str] = Counter()
        for path in entries:
            if path.name.startswith(files.TEMPORARY_PREFIX):
                self._clear_if_orphaned(path)
                continue
            if not path.is_dir():
                continue
            try:
                manifest = Manifest.decode(files.read_small(path / files.MANIFEST_FILE))
                last_used = (path / files.MANIFEST_FILE).stat().st_mtime
            except (OSError, ValueError) as error:
                logger.warning("Snapshot %s is not used: its manifest cannot be read: %s", path.name, error)
                continue
            differences = self.identity.differences(manifest.identity)
            if differences:
                others[", ".join(differences)] += 1
            elif path.name != self._name(manifest.record.prompt_id):
                logger.warning("Snapshot %s is not used: it holds %s.", path.name, manifest.record.prompt_id)
            else:
                found.append((last_used, manifest.record))
        for what, count in others.items():
            logger.info("%d snapshots in %s are of another setup (%s) and are not used.", count, self.folder, what)
        found.sort(key=lambda entry: entry[0], reverse=True)
        self._hard = {record.prompt_id for _, record in found if record.pin == "hard"}
        return [record for _, record in found]

    def read(self, record: SnapshotRecord, image: Sequence[np.ndarray]) -> SnapshotOutcome:
        """Fills `image` with a prompt's K/V; on any other outcome than OK its bytes are worth nothing.

        Args:
            record: What is asked for; tokens, start and size are compared with what the snapshot says.
            image: K of every layer, then V, group by group; uint8 [num_blocks, block_bytes] each, contiguous.
        """
        path = self.folder / self._name(record.prompt_id)
        try:
            manifest = Manifest.decode(files.read_small(path / files.MANIFEST_FILE))
            self._check(manifest, record, image)
            self._read_tensors(path / files.TENSORS_FILE, manifest, image)
        except FileNotFoundError as error:
            return self._missed(path, SnapshotOutcome.MISSING, f"{error.filename} is not there")
        except _MismatchError as error:
            return self._missed(path, SnapshotOutcome.MISMATCH, str(error))
        except (ValueError, EOFError) as error:
            outcome = self._missed(path, SnapshotOutcome.DAMAGED, str(error))
            files.remove(path)
            return outcome
        except OSError as error:
            return self._missed(path, SnapshotOutcome.ERROR, str(error))
        self._touch(path)
        return SnapshotOutcome.OK

    def _check(self, manifest: Manifest, record: SnapshotRecord, image: Sequence[np.ndarray]) -> None:
        differences = self.identity.differences(manifest.identity)
        if differences:
            raise _MismatchError(f"it is of another setup ({', '.join(differences)})")
        found = manifest.record
        if _extent_of(found) != _extent_of(record):
            raise _MismatchError("it is of other tokens")
        if [tensor.shape for tensor in image] != self._shapes(record):
            raise _MismatchError("it has another shape")

    def _header(self, record: SnapshotRecord) -> bytes:
        return files.safetensors_header(self._shapes(record), self.identity.num_window_tensors)

    def _shapes(self, record: SnapshotRecord) -> list[tuple[int, int]]:
        """Blocks, and bytes of one, of every tensor."""
        sizes, num_window = self.identity.block_bytes, self.identity.num_window_tensors
        blocks = [record.num_blocks] * (len(sizes) - num_window) + [record.num_window_blocks] * num_window
        return list(zip(blocks, sizes, strict=True))

    def _read_tensors(self, path: Path, manifest: Manifest, image: Sequence[np.ndarray]) -> None:
        header = self._header(manifest.record)
        descriptor = files.open_regular(path)
        try:
            if os.fstat(descriptor).st_size != len(header) + sum(tensor.nbytes for tensor in image):
                raise ValueError(f"{path.name} has not the size that it must have")
            if os.read(descriptor, len(header)) != header:
                raise ValueError(f"{path.name} has another header than it must have")
            for i, expected in enumerate(manifest.tensor_digests):
                if files.read_tensor(descriptor, image[i]) != expected:
                    name = files.tensor_name(i, len(image), self.identity.num_window_tensors)
                    raise ValueError(f"tensor {name} does not match its checksum")
        finally:
            os.close(descriptor)

    @staticmethod
    def _missed(path: Path, outcome: SnapshotOutcome, why: str) -> SnapshotOutcome:
        logger.warning("Snapshot %s is not used: %s.", path.name, why)
        return outcome

    @staticmethod
    def _touch(path: Path) -> None:
        try:
            os.utime(path / files.MANIFEST_FILE)
        except OSError as error:
            logger.debug("The last use of %s cannot be noted: %s", path.name, error)

    # Changing --------------------------------------------------------------------------------------------------

    def write(self, record: SnapshotRecord, image: Sequence[np.ndarray]) -> SnapshotOutcome:
        """Writes a snapshot in place of an older one of the same prompt, and makes room for it first.

        Args:
            image: K of every layer, then V, group by group; uint8 [num_blocks, block_bytes] each, contiguous.
        """
        header = self._header(record)
        temporary = self.folder / f"{files.TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        held: int | None = None
        try:
            files.private_folder(self.folder)
            needed = len(header) + sum(tensor.nbytes for tensor in image) + self._manifest_bytes(record)
            if not self._make_room(needed, self._name(record.prompt_id)):
                logger.warning(
                    "No snapshot of %s: it takes %d bytes, more than --system-prompt-cache-dir-gib allows (%d bytes).",
                    record.prompt_id,
                    needed,
                    self.max_bytes,
                )
                return SnapshotOutcome.TOO_LARGE
            temporary.mkdir(mode=0o700)
            held = files.lock(temporary)
            digests = [hashlib.sha256(tensor.data).hexdigest() for tensor in image]
            files.write_file(temporary / files.TENSORS_FILE, self._pieces(header, image))
            manifest = Manifest(self.identity, record, digests)
            files.write_file(temporary / files.MANIFEST_FILE, [manifest.encode()])
            self._publish(temporary, record.prompt_id)
        except OSError as error:
            logger.warning("No snapshot of %s: %s", record.prompt_id, error)
            return SnapshotOutcome.ERROR
        finally:
            files.remove(temporary)
            if held is not None:
                os.close(held)
        self._note_class(record)
        return SnapshotOutcome.OK

    def update(self, record: SnapshotRecord) -> SnapshotOutcome:
        """Notes how a prompt is pinned now (name, ttl, class) in its snapshot, if it has one."""
        path = self.folder / self._name(record.prompt_id)
        temporary = path / f"{files.TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        try:
            manifest = Manifest.decode(files.read_small(path / files.MANIFEST_FILE))
            if manifest.identity != self.identity or manifest.record.token_ids != record.token_ids:
                return SnapshotOutcome.MISMATCH
            changed = Manifest(self.identity, record, manifest.tensor_digests)
            files.write_file(temporary, [changed.encode()])
            temporary.rename(path / files.MANIFEST_FILE)
            files.sync_folder(path)
        except FileNotFoundError:
            return SnapshotOutcome.MISSING
        except (OSError, ValueError) as error:
            logger.warning("Snapshot %s keeps its old description: %s", path.name, error)
            return SnapshotOutcome.ERROR
        self._note_class(record)
        return SnapshotOutcome.OK

    def delete(self, prompt_id: str) -> SnapshotOutcome:
        """Deletes the snapshot of a prompt, if there is one."""
        path = self.folder / self._name(prompt_id)
        self._hard.discard(prompt_id)
        if not path.exists():
            return SnapshotOutcome.MISSING
        files.remove(path)
        return SnapshotOutcome.ERROR if path.exists() else SnapshotOutcome.OK

    def _pieces(self, header: bytes, image: Sequence[np.ndarray]) -> Iterator[bytes | memoryview]:
        yield header
        for tensor in image:
            yield from files.pieces_of(tensor)

    def _publish(self, temporary: Path, prompt_id: str) -> None:
        """Gives a finished snapshot its name."""
        files.sync_folder(temporary)
        path = self.folder / self._name(prompt_id)
        if path.exists():
            # A folder cannot be renamed over another one that holds files.
            files.remove(path)
        temporary.rename(path)
        files.sync_folder(self.folder)

    def _make_room(self, needed: int, replaced: str) -> bool:
        """Deletes snapshots, the longest unused first and an operator's last, until `needed` bytes are free."""
        if needed > self.max_bytes:
            return False
        kept: list[tuple[bool, float, int, Path]] = []
        total = 0
        for path in self.folder.iterdir():
            if path.name == replaced or path.name.startswith(files.TEMPORARY_PREFIX):
                continue
            try:
                size = sum(file.stat().st_size for file in path.iterdir())
                last_used = (path / files.MANIFEST_FILE).stat().st_mtime
            except OSError:  # half-deleted by another server, or not ours to look at
                continue
            kept.append((self._is_hard(path.name), last_used, size, path))
            total += size
        for _, _, size, path in sorted(kept, key=lambda entry: entry[:2]):
            if total + needed <= self.max_bytes:
                break
            logger.info("Snapshot %s is deleted to make room for another one.", path.name)
            files.remove(path)
            total -= size
        return total + needed <= self.max_bytes

    def _manifest_bytes(self, record: SnapshotRecord) -> int:
        digests = ["0" * 64] * (len(self.identity.block_bytes))
        return len(Manifest(self.identity, record, digests).encode())

    def _is_hard(self, name: str) -> bool:
        return name.endswith(self._suffix) and name.removesuffix(self._suffix) in self._hard

    def _note_class(self, record: SnapshotRecord) -> None:
        if record.pin == "hard":
            self._hard.add(record.prompt_id)
        else:
            self._hard.discard(record.prompt_id)

    def _name(self, prompt_id: str) -> str:
        return prompt_id + self._suffix

    @staticmethod
    def _clear_if_orphaned(path: Path) -> None:
        """Deletes what a write has left that was broken off; one that goes on holds a lock."""
        try:
            held = files.lock(path)
        except OSError:
            held = None
        if held is None:
            return
        logger.info("Deleting %s, which an unfinished write has left.", path)
        files.remove(path)
        os.close(held)


class _MismatchError(Exception):
    """A snapshot is whole, but not of what was asked for."""


def _extent_of(record: SnapshotRecord) -> tuple[str, list[int], int, int, int]:
    """What its bytes are of."""
    return record.prompt_id, record.token_ids, record.start, record.num_blocks, record.num_window_blocks
