"""Data of a training run: its plan and the check of its files, samples by number, and micro-batches of each step."""
