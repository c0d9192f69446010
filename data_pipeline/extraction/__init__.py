"""From records to text: main text of pages, encodings repaired, what is blocked, and what a page may cost."""
