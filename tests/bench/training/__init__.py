"""Speed of training steps beside transformers, plain PyTorch and litgpt: `make bench-train`."""
