"""Rejection sampling: completions of a model, scored and filtered into dialogues to train on."""
