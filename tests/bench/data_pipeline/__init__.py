"""The data pipeline against stock datatrove, on the same documents in the same run, one core each."""
