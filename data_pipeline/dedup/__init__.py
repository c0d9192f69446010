"""Deduplicates whole documents: fingerprints, pairs that share one, clusters of pairs, the best document of each.

No step holds more than a stated part of the fingerprints in memory; larger arrays lie in files.
"""
