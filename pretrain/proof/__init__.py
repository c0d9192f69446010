"""Implements `trivium prove`, which compares parallel layouts with one rank, tensor by tensor."""
