"""Benchmarks of the data pipeline against stock datatrove: the same documents in the same run, one core each."""
