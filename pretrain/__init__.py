"""Pretraining: the model, the parallel engine, the train loop that SFT and RL share, checkpoints and proofs."""
