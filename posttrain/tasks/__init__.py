"""Tasks with rewards: prompts, verifiers, and the accuracy of a model on held-out prompts."""
