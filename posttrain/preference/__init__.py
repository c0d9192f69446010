"""Preferences: pairs of answers, of which one was chosen."""
