"""Attention over pinned extents and paged suffixes: prefix + suffix + merge."""
