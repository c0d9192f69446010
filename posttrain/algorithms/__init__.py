"""The arithmetic of policy optimisation as pure functions of tensors: advantages, policy losses, KL, aggregation."""
