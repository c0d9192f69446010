"""The base of all stages: running a stage once, and its ledger, tables, shards, checksums and progress."""
