"""Records that a training run keeps while it runs: its steps, metrics, text samples and the use of its time."""
