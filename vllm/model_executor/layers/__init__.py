"""Layers that know which part of a weight their rank holds."""
