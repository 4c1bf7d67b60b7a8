"""Building blocks of the attention backends."""
