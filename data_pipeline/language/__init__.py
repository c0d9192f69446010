"""Which language a document is in, and whether its source expects it."""
