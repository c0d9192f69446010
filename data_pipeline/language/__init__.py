"""Language identification, and the check that a document's source expects its language."""
