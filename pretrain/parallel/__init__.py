"""Who computes what on which rank: groups, the pipeline schedule, ZeRO, and the gradients they leave to us."""
