"""Models without weights, and configs of post-training that begin from them, for tests that start with --dry-run."""

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from configs.loader import toml
from configs.sealed import CHECKPOINT
from posttrain import distill, dpo, grpo, ppo, rm, sample, sft
from posttrain.rl import rollout_file
from pretrain.checkpoint.lineage import Lineage, Pin
from tests.remedies import Run, torchrun_environment

MODEL = {
    "vocab_size": 400,
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_heads": 8,
    "num_kv_heads": 4,
}
CONTEXT = 64
SHORT = 7  # tokens of the rows of a model whose rows are too short for any prompt and its answer
ROW = 48  # tokens of a row of the run that has begun
COMMANDS: dict[str, ModuleType] = {
    **{"sft": sft, "grpo": grpo, "dpo": dpo, "rm": rm, "ppo": ppo, "distill": distill, "sample": sample}
}


def write_untrained(folder: Path, tokenizer_file: Path, **models: dict[str, Any]) -> Path:
    """Writes a config for each command, and checkpoints, without weights, of three models and of further `models`.

    One is dense, one has experts, and "short" is a dense one that was trained on short rows. Each further one is a
    dense one with these keys. Returns the folder.
    """
    moe = {"moe": {"num_experts": 6, "capacity_factor": 1.5}}
    made = {"dense": {}, "moe": moe, "short": {}, **models}
    for name, more in made.items():
        checkpoint = folder / name / "checkpoints" / "step_1"
        checkpoint.mkdir(parents=True)
        shutil.copy(tokenizer_file, folder / name / "tokenizer.model")
        facts = {
            "step": 1,
            "files": {},
            "config": {"model": MODEL | more},
            "identity": Lineage(tokenizer_file).identity,
            "context": SHORT if name == "short" else CONTEXT,
        }
        (checkpoint / "manifest.json").write_bytes(CHECKPOINT.write(facts))
    began = Pin.of(folder / "dense/checkpoints/step_1")
    begun = folder / "begun/checkpoints/step_2"
    begun.mkdir(parents=True)
    shutil.copy(tokenizer_file, folder / "begun/tokenizer.model")
    facts = json.loads(Path(began.checkpoint, "manifest.json").read_text())
    init = {"run": str(folder / "dense")}
    config = facts["config"] | {"init": init, "train": {"global_batch_size": 16}}
    facts |= {"step": 2, "samples": 32, "init": vars(began), "config": config}
    del facts["identity"]["chat_template"]
    facts["identity"] |= {"seq_length": ROW, "init": began.sha256}
    (begun / "manifest.json").write_bytes(CHECKPOINT.write(facts))
    talk = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "I am fine, thank you."}]
    lines = [json.dumps({"id": str(i), "messages": talk * (1 + i % 3)}) for i in range(20)]
    (folder / "dialogues.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    train = {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2, "seq_length": 48}
    common = {"run": {"dir": str(folder / "run")}, "train": train, "optimizer": {"lr": 0.001}}
    task = {"digits": 4, "max_new_tokens": 8, "eval_prompts": 4}
    data = {"dialogues": [str(folder / "dialogues.jsonl.gz")], "heldout_share": 0.0, "max_bad_share": 1.0}
    init = {"run": str(folder / "dense")}
    trees = {
        "sft": {**common, "init": init, "data": data, "task": {**task, "demonstrations": 8}},
        "grpo": {**common, "init": init, "task": task, "grpo": {"group_size": 4}},
        "ppo": {**common, "init": init, "task": task},
        "dpo": {**common, "init": init, "data": {"pairs": [str(folder / "pairs.jsonl")]}},
        "distill": {**common, "init": init, "teacher": init, "data": data},
        "sample": {"run": {"dir": str(folder / "sampled")}, "init": init, "task": task, "sample": {"completions": 2}},
        "rm": {**common, "init": init, "data": {"files": [str(folder / "pairs.jsonl")]}},
    }
    pairs = [{"prompt": f"Say {i}", "chosen": "I am fine", "rejected": "I"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    judged = [{"prompt": f"Say {i}", "completion": "I am fine", "label": i % 2 == 0} for i in range(40)]
    for name, records in (("judged", judged), ("same", judged[::2])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "rollouts").mkdir()
    rollout_file.path_of(folder / "rollouts", 0).touch()
    for name, tree in trees.items():
        (folder / f"{name}.toml").write_bytes(toml(tree))
    return folder


def dry_runs(base: Path, patch: pytest.MonkeyPatch) -> dict[str, Run]:
    """Returns functions of (ranks, overrides) that run each command with --dry-run in `base`, by the command's name."""

    def of(name: str) -> Run:
        def call(ranks: int, overrides: Sequence[str]) -> None:
            torchrun_environment(patch, ranks)
            assert COMMANDS[name].main([str(base / f"{name}.toml"), "--dry-run", *overrides]) == 0

        return call

    return {name: of(name) for name in COMMANDS}
