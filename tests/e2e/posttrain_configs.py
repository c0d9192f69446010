"""Configs of SFT and GRPO of a tiny model that learns to sort, and the files that they need."""

import gzip
import json
from pathlib import Path
from typing import Any

from configs.loader import toml
from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.tokenizer_training import train as train_tokenizer
from tests.parallel.harness import RanksOf
from tests.shards import write_shard
from tests.training_configs import training_config

VOCAB = 301
MODEL = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
}
SORT = {"digits": 3, "max_new_tokens": 6}


def sft_config(base: Path) -> dict[str, Any]:
    """Returns the config of SFT from the untrained model, on dialogues and sorting tasks."""
    return training_config(
        base / "sft",
        75,
        (8, 4),
        128,
        run={"seed": 5},
        init={"run": str(base / "init"), "tokenizer": str(base / "tokenizer")},
        data={"dialogues": [str(base / "dialogues.jsonl.gz")], "heldout_share": 0.2},
        task=SORT | {"eval_prompts": 8, "demonstrations": 1500},
        optimizer={"lr": 2e-3},
        schedule={"warmup_steps": 3},
        eval={"every": 1000},
    )


def rl_config(base: Path, run: str, steps: int, batch: tuple[int, int], seq_length: int, **own: Any) -> dict[str, Any]:
    """Returns a config of reinforcement learning, or of online DPO, from the fine-tuned model; `own` has its sections.

    The run is the folder `run` in `base`.
    """
    shared: dict[str, Any] = {
        "run": {"seed": 5},
        "init": {"run": str(base / "sft"), "tokenizer": str(base / "tokenizer")},
        "optimizer": {"lr": 2e-4, "eps": 1e-5, "weight_decay": 0.0},
        "eval": {"every": 1000},
    }
    return training_config(base / run, steps, batch, seq_length, **shared, **own)


def grpo_config(base: Path) -> dict[str, Any]:
    """Returns the config of GRPO on sorting tasks."""
    own = {"task": SORT | {"eval_prompts": 8}, "grpo": {"group_size": 8}, "checkpoint": {"every": 2}}
    return rl_config(base, "grpo", 60, (64, 32), 24, **own)


def write_base(ranks: RanksOf, base: Path, context: int = 128, **model: Any) -> Path:
    """Writes a tokenizer, dialogues, an untrained model, and a config for each command; returns the folder.

    The model counts as trained on texts of up to `context` tokens; `model` has its keys that differ from `MODEL`.
    """
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
    (base / "sft.toml").write_bytes(toml(sft_config(base)))
    (base / "grpo.toml").write_bytes(toml(grpo_config(base)))
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(base / "init"),
        model=MODEL | model,
        tokenizer=str(base / "tokenizer/tokenizer.model"),
        context=context,
    )
    return base
