"""Reward models: a scalar head in a language model's place, which says how good a dialogue, step or text is."""
