"""Starts the other packages as processes: the demo, ranks of one machine; reads what a cluster's launcher set.

Imports no torch.
"""
