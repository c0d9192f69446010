"""`trivium drill`: breaks small training runs of a user's config on purpose, and says whether they recover."""
