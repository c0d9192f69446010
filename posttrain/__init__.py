"""Post-training: SFT, reward models, preferences, RL, distillation and sampling, on pretraining's trainer."""
