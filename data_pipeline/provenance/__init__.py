"""Commands that trace documents to training steps and back, show why documents were dropped, and verify a run."""
