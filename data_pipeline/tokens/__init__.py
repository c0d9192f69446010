"""Tokenizers, and stores of the tokens that they make."""
