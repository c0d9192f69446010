"""One compiled pass over a text: its words, lines and n-grams, and every quality score made of them."""
