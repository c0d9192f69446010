"""Formulas of policy optimization as pure functions of tensors: advantages, policy losses, KL, aggregation."""
