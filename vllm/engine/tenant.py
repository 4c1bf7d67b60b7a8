"""Whose request is being served, where several API keys tell clients apart."""

from __future__ import annotations

from contextvars import ContextVar

current_tenant: ContextVar[str | None] = ContextVar("current_tenant", default=None)
"""Set by what checks the keys, read where a request enters the engine: a route in between cannot forget to hand it on.
None where there is one key or none, and all clients share one namespace."""
