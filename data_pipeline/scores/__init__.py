"""What is measured of a document, by rule or model, and the thresholds on it."""
