"""Text from a model: its loop, settings, sampling and drafts, and chats."""
