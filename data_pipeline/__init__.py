"""Raw files to a mixture plan: reading, filtering, deduplication, tokens, packing. Never imports torch."""
