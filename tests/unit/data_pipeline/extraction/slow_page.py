"""An HTML page on which an extractor takes minutes."""

# Within all bounds, and quadratic in the number of options.
SLOW = "<select>" + "<option>x" * 60_000
