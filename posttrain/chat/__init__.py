"""Dialogues: the chat format, and fine-tuning rows that are made of them."""
