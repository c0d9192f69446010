"""Watchdog of a training run: ends a run in which no rank makes progress, and says which rank holds up the others."""
