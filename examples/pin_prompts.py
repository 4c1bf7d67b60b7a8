"""Pins a system prompt before anybody asks, asks the server what it would do for a request, and unpins it.

Start a server (`make serve`), then: python examples/pin_prompts.py http://localhost:8000
With --admin-api-key, give the key as a second argument.
"""

import sys

import httpx

url, *key = sys.argv[1:]
server = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key[0]}"} if key else {}, timeout=120)

system = {"role": "system", "content": "You are a travel agent. Answer in one sentence."}
pinned = server.post("/v1/system_prompts", json={"messages": [system], "name": "travel agent", "ttl": 3600}).json()
print(f"{pinned['name']} is {pinned['state']}: {pinned['num_tokens']} tokens, {pinned['num_bytes']} bytes")

request = {"messages": [system, {"role": "user", "content": "Where is it warm in May?"}]}
explained = server.post("/v1/system_prompts?explain=1", json=request).json()
print(f"{explained['outcome']}: {explained['reason']}")

print(server.delete(f"/v1/system_prompts/{pinned['id']}").json()["message"])
