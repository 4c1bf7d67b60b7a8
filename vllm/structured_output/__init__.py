"""Output that follows a JSON schema, a regular expression, a grammar or a list of choices.

A constraint is compiled by a process of its own, within limits of time and memory (`compiler`, `compile_server`). The
engine matches each drawn token against it and tells the sampler which tokens may come next (`matcher`).
"""
