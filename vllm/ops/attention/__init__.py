"""Attention over pinned extents and own blocks: the kernels, their work lists, and the merge of partial results."""
