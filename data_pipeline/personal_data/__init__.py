"""Finds personal data, keys and tokens in texts, and hides them in ids, URLs, file names and metadata."""
