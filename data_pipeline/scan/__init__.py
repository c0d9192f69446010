"""Compiled scan of a text: its words, lines and n-grams, and all quality scores that need no model."""
