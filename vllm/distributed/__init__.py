"""Ranks that share one model."""
