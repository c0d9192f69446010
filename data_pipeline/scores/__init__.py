"""The score and filter stages: scores of each document, computed by rules or models, and thresholds on them."""
