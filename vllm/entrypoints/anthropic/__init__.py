"""The Messages API of Anthropic: requests become chats, answers are written as content blocks."""
