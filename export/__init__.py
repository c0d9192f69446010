"""Export to and import from Hugging Face, generation and chat. Imports pretrain and configs, never posttrain."""
