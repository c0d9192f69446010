"""`trivium data report`: tables and an HTML page about a data run."""
