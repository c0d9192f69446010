"""A training run as a whole: its directory and history, the state it begins with, and what its ranks agree on."""
