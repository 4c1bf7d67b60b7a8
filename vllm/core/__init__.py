"""Decisions of the engine: who runs, where KV lives, what is pinned. Integers and lists only; no torch."""
