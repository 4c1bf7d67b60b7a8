"""One rank: its device, weights, KV memory and forward pass."""
