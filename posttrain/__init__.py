"""Post-training: chat data and SFT, verifiable tasks, rollouts and GRPO, all on pretraining's one trainer."""
