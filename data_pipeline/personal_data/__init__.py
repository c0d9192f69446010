"""Personal data, keys and tokens: where a text holds them, and hiding them in names, URLs and metadata."""
