"""How linear layers hold their weights, a file each."""
