"""How the ranks are started and called."""
