"""The Responses API of OpenAI.

A request, with the responses that it goes on from, becomes a chat (`request`, `items`); the events of the answer are
written as items (`writer`); responses are kept for clients who come back to them (`store`, `lookup`).
"""
