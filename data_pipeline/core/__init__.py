"""The base of all stages: runs a stage once, and keeps its ledger, tables, shards, checksums and progress."""
