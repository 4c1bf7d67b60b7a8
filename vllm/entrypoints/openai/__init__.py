"""The OpenAI API as vLLM's users know it: models, chat and text completions, tokenisation, and `/v1/system_prompts`.

`api_server` and `run_batch` are programs: they are started by these names, and use all other rooms.
"""
