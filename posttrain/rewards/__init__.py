"""Rewards, which score what a model wrote: a file each, with one function, and a dict of all of them by name."""
