"""The Anthropic SDK, with a part of the prompt marked to be cached.

Start a server (`make serve`), then: python examples/anthropic_messages.py http://localhost:8000
"""

import sys

from anthropic import Anthropic

client = Anthropic(base_url=sys.argv[1], api_key="EMPTY")
manual = "A colophon stands at the end of a book and says who made it. " * 20

for question in ("What is a colophon?", "Where does it stand?"):
    message = client.messages.create(
        model=client.models.list().data[0].id,
        system=[{"type": "text", "text": manual, "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": question}],
        max_tokens=32,
    )
    print(question, message.content[0].text)
    print(f"  written {message.usage.cache_creation_input_tokens}, read {message.usage.cache_read_input_tokens}")
