"""The mixture plan: shares of sources, epochs, packing of documents into training rows, and reading of the rows."""
