"""Rehearsal of a training step of a large job on one machine, rank by rank and without other ranks."""
