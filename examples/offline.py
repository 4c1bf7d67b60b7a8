"""Without a server: a system prompt that is computed once for a batch of chats.

python examples/offline.py [MODEL]
"""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1]) if len(sys.argv) > 1 else LLM()
    system = {"role": "system", "content": "You are a librarian. Answer in one sentence."}
    llm.add_system_prompt([system], name="librarian")
    chats = [[system, {"role": "user", "content": q}] for q in ("What is a colophon?", "What is a folio?")]
    for output in llm.chat(chats, SamplingParams(temperature=0, max_tokens=24)):
        print(output.num_cached_tokens, "tokens read:", output.outputs[0].text)
