"""Health of a training run: bad steps and how it goes back before them, and what computes wrongly or slowly."""
