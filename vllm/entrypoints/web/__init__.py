"""The page at `/`: what the pool holds and saves, what the server does, a chat, and why a request hits or misses."""
