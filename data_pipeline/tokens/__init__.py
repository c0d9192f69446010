"""The tokenizer, and the token stores that hold the encoded documents."""
