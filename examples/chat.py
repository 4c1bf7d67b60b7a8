"""Two chats with the same system prompt: the second one does not compute it again.

Start a server (`make serve`), then: python examples/chat.py http://localhost:8000
"""

import sys

from openai import OpenAI

SYSTEM = "You are a librarian. Answer in one sentence. " + "Every book has a place on a shelf. " * 20

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="EMPTY")
model = client.models.list().data[0].id

for question in ("What is a colophon?", "What is a folio?", "What is a quire?"):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        max_tokens=32,
    )
    usage = answer.usage
    print(question, answer.choices[0].message.content)
    print(f"  {usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} prompt tokens were not computed")
