"""Deduplication of whole documents: fingerprints, pairs that share one, clusters, and the best of each.

No step holds more than a stated share of the fingerprints in memory; what outgrows it lies in files.
"""
