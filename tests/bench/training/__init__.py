"""Speed of training steps beside transformers and plain PyTorch: `make bench-train`."""
