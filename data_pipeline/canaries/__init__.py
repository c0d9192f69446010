"""Canaries: documents with a known fate, planted in a run's input to check that its stages work."""
