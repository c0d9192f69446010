"""What every stage stands on: stages that run once, their ledger, tables, shards, checksums and progress."""
