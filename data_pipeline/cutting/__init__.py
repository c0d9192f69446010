"""Parts that are taken out of documents: what finds them, tables of byte spans, and the one rewrite at the end."""
