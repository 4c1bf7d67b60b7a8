"""From a chat to its answer, the same for all dialects: the messages, the prompt and its system part, the sampling
options, the generation, and the parsers that tell reasoning, text and tool calls apart.
"""
