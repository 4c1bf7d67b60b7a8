"""The flags of the server and of the commands.

`cli_args` has those that do something, `compatibility_args` those of vLLM that have no effect here or are refused by
name, and `parser` reads both, from the command line and from `--config`.
"""
