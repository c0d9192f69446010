"""Finds parts of documents to remove or replace, and records them as byte spans, which are applied once at the end."""
