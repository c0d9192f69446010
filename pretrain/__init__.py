"""Pretraining: the model, the parallel engine, the one train loop, checkpoints."""
