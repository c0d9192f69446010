"""The families of models that Trivium reads and writes as transformers does, one file for each group."""
