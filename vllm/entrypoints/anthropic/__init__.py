"""The Messages API of Anthropic.

A request becomes a chat (`conversation`, `request`), its cache breakpoints are checked (`cache_control`), and the
events of the answer are written as content blocks (`writer`).
"""
