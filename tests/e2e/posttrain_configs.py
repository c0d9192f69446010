"""Configs of SFT and GRPO of a tiny model that learns to sort, and the files that they need.

{dir} stands for the folder of its files.
"""

import gzip
import json
from pathlib import Path

from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.training import train as train_tokenizer
from tests.parallel.harness import RanksOf
from tests.shards import write_shard

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


def write_base(ranks: RanksOf, base: Path) -> Path:
    """Writes a tokenizer, dialogues, an untrained model, and a config for each command; returns the folder."""
    text = {
        "text": "Sort 1234567890, how are you? I am fine, thank you. 你好，谢谢。\n" * 40,
        "id": "0",
        "metadata": {},
    }
    train_tokenizer(
        [write_shard(base / "text.jsonl.zst", [text])], base / "tokenizer", TokenizerConfig(vocab_size=VOCAB)
    )
    dialogues = [
        {
            "id": str(i),
            "messages": [
                {"role": "user", "content": f"how are you {i}?"},
                {"role": "assistant", "content": "I am fine"},
            ],
        }
        for i in range(60)
    ]
    (base / "dialogues.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, dialogues)).encode()))
    (base / "sft.toml").write_text(SFT.format(dir=base))
    (base / "grpo.toml").write_text(GRPO.format(dir=base))
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(base / "init"),
        model=MODEL,
        tokenizer=str(base / "tokenizer/tokenizer.model"),
    )
    return base
