"""The HTML page of `trivium data report`."""
