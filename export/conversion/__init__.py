"""The conversion table: names, tensors and config keys of Trivium's models and of their Hugging Face counterparts.

A family is one `Family` (table.py) in `families/`: rules for tensors and keys for config.json, both read both ways.
docs/families.md shows how to add one.
"""
