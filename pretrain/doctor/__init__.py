"""`trivium doctor`: looks for what would end a training run before it begins, and says why a run has ended."""
