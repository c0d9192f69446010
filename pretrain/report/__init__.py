"""Pages about training runs, drawn from what they wrote; no module here imports torch."""
