"""Text from a model: sampling token by token, changes to logits, and the way from text to tokens and back."""
