"""Configs of SFT and GRPO of a tiny model that learns to sort; {dir} stands for the folder of its files."""

VOCAB = 301
MODEL = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
}
SFT = """
[run]
dir = "{dir}/sft"
seed = 5
[init]
run = "{dir}/init"
tokenizer = "{dir}/tokenizer"
[data]
dialogues = ["{dir}/dialogues.jsonl.gz"]
heldout_share = 0.2
[task]
digits = 3
max_new_tokens = 6
eval_prompts = 8
demonstrations = 1500
[train]
steps = 75
global_batch_size = 8
micro_batch_size = 4
seq_length = 128
precision = "fp32"
[optimizer]
lr = 2e-3
[schedule]
kind = "constant"
warmup_steps = 3
[eval]
every = 1000
[log]
tensorboard = false
"""
GRPO = """
[run]
dir = "{dir}/grpo"
seed = 5
[init]
run = "{dir}/sft"
tokenizer = "{dir}/tokenizer"
[task]
digits = 3
max_new_tokens = 6
eval_prompts = 8
[grpo]
group_size = 8
[train]
steps = 60
global_batch_size = 64
micro_batch_size = 32
seq_length = 24
precision = "fp32"
[optimizer]
lr = 2e-4
eps = 1e-5
weight_decay = 0.0
[schedule]
kind = "constant"
[checkpoint]
every = 2
[eval]
every = 1000
[log]
tensorboard = false
"""
