"""Parallel training: process groups, pipeline schedules, ZeRO, and the gradient sums that neither of them takes."""
