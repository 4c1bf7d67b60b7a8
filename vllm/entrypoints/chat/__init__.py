"""From a chat to its answer, the same for all dialects.

`request` is what every dialect's request becomes. `messages`, `prompts` and `cache_marks` make its prompt and find
where the system part ends, `sampling` and `output_form` its options, and `generation` its outputs. `service` joins them
and hands on the answer as a stream of `events`, of which the parsers have told reasoning, text and tool calls apart.
"""
