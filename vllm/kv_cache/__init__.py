"""What the layers of a network keep between steps, and where it lies."""
