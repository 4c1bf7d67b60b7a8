"""Snapshots of pinned system prompts on disk, which survive a restart."""

from vllm.system_prompt_store.identity import SnapshotIdentity, snapshot_identity
from vllm.system_prompt_store.manifest import SnapshotRecord
from vllm.system_prompt_store.store import SnapshotOutcome, SnapshotStore

__all__ = ["SnapshotIdentity", "SnapshotOutcome", "SnapshotRecord", "SnapshotStore", "snapshot_identity"]
