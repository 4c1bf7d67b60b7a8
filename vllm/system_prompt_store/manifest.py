"""The JSON beside a snapshot's tensors: what they are, and the checksums that they must have."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from vllm.system_prompt_store.identity import SnapshotIdentity


class SnapshotRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which system prompt a snapshot is of, and how it was pinned.

    Attributes:
        prompt_id: Its id in the pool.
        token_ids: All of its tokens, from position 0 on.
        start: Position of the first token whose K/V the snapshot holds; not 0 for a prompt that extends another one.
        num_blocks: Blocks of the extent.
        num_window_blocks: Blocks of what the window group keeps.
        pin: Its class; what is pinned `hard` is brought back by a restart before it serves.
        name, source, ttl: As the pool has them.
        scope: Who may read it, in hexadecimal; empty for everybody.
    """

    prompt_id: str
    token_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]]
    start: int
    num_blocks: int
    pin: Literal["hard", "automatic", "soft"]
    name: str | None = None
    source: str = "auto"
    ttl: float | None = None
    scope: str = ""
    num_window_blocks: int = 0


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is known of a snapshot.

    Attributes:
        tensor_digests: SHA-256 (hex) of K of every layer, then of V of every layer.
        digest: SHA-256 (hex) over the rest of the manifest.
    """

    identity: SnapshotIdentity
    record: SnapshotRecord
    tensor_digests: list[str]
    digest: str = ""

    def encode(self) -> bytes:
        """The manifest as JSON, its own digest in it."""
        return msgspec.json.encode(msgspec.structs.replace(self, digest=self._expected_digest()))

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Reads a manifest and checks it against its digest.

        Raises:
            ValueError: it is not one, or was changed.
        """
        manifest = msgspec.json.decode(data, type=cls)  # its errors are ValueErrors
        if manifest.digest != manifest._expected_digest():
            raise ValueError("it does not match its own digest")
        if len(manifest.tensor_digests) != len(manifest.identity.block_bytes):
            raise ValueError("it does not list every tensor")
        return manifest

    def _expected_digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(self, digest=""))).hexdigest()
