"""Reinforcement learning: completions sampled from the model in training, and the batches made of them."""
