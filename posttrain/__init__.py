"""Post-training: SFT on chat data, verifiable tasks, and GRPO on rollouts, all with pretraining's trainer."""
