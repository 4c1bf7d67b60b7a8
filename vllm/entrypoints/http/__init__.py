"""What every request passes, whichever API it speaks: bodies and their limits, errors, keys, streams, metrics.

Nothing here knows what a chat is; the rooms above build on it.
"""
