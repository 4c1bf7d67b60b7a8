"""The Anthropic API on top of the chat path."""
