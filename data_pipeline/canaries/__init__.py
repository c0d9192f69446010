"""Documents with a known fate, planted in a run's input to see that its stages work."""
