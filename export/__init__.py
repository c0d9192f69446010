"""Hugging Face in and out, verified; generation and chat. Imports pretrain and configs, never posttrain."""
