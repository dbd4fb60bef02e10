"""Conversations: messages, the chat template that makes a prompt of them, and the parser of answers."""
