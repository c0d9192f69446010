"""From token stores to training rows: shares, epochs, packing, plans and reading them."""
