"""Rows of random words that stand in for a data plan, made by a data run of their own."""

import json
import random
import subprocess
import sys
from pathlib import Path

from configs.loader import Failure, toml

DOCUMENTS, WORDS, LONGEST = 400, 300, 120
SEED = 0


def make_rows(folder: Path, seq_length: int, samples: int, vocab_size: int) -> Path:
    """Writes a plan of `samples` rows below `folder`, and returns the plan's folder.

    Its tokenizer is trained on the words, with `vocab_size` tokens. Raises Failure if that fails, as it does for more
    tokens than there are parts of so few words.
    """
    rng = random.Random(SEED)
    words = ["".join(rng.choices("aeioubdfgklmnprstvz", k=rng.randint(2, 7))) for _ in range(WORDS)]
    documents = ({"text": " ".join(rng.choices(words, k=rng.randint(20, LONGEST)))} for _ in range(DOCUMENTS))
    folder.mkdir(parents=True)
    file, config = folder / "words.jsonl", folder / "data.toml"
    file.write_text("".join(f"{json.dumps(document)}\n" for document in documents), encoding="utf-8")
    tree = {
        "run": {"dir": str(folder / "run"), "workers": 1},
        "sources": {"words": {"files": [str(file)], "format": "jsonl", "rules": {"any": "all"}}},
        "rules": {"all": {}},
        "tokenizer": {"vocab_size": vocab_size},
        "mixture": {
            "seq_length": seq_length,
            "samples": samples,
            "weights": {"words": 1.0},
            "packing": "concat",
            "max_epochs": 10_000,
        },
    }
    config.write_bytes(toml(tree))
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.command", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise Failure(
            f"no rows of {vocab_size} tokens could be made to train on; set model.vocab_size=512, or name the folder "
            f"of a plan as data.plan; this is why: {done.stdout.strip()[-2000:]}"
        )
    return folder / "run" / "plan"
