"""The Responses API of OpenAI: requests become chats, answers are written as items, and responses are kept."""
