"""Benchmark of reinforcement learning: what it learns on tiny tasks, and how fast rollouts are beside a peer."""
