"""A page that takes an extractor minutes."""

# Within all bounds, and quadratic in the number of options.
SLOW = "<select>" + "<option>x" * 60_000
