"""GRPO and PPO on an environment of the package verifiers: its scores, the learnt tokens, and a run that goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import toml
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat
from posttrain.rl import rollout_file
from pretrain.checkpoint import storage
from tests.e2e.posttrain_configs import rl_config, write_base
from tests.e2e.recorded_turns import turns_of
from tests.e2e.started_commands import CLI, ROOT
from tests.parallel.harness import RanksOf
from tests.parallel.runs import metrics
from tests.verifiers_game import FILE, SOURCE, TASKSET, messages_in, own_scores, own_tasks

pytest.importorskip("verifiers", reason="the package verifiers (in extra `verifiers`) is not installed")
ROLES = ("system", "user", "assistant", "user", "assistant")


@pytest.fixture
def on_path(tmp_path: Path) -> Iterator[None]:
    (tmp_path / FILE).write_text(SOURCE)
    sys.path.insert(0, str(tmp_path))
    yield
    sys.path.remove(str(tmp_path))
    sys.modules.pop(Path(FILE).stem, None)


@pytest.mark.full
def test_grpo_learns_from_what_verifiers_scores(ranks: RanksOf, tmp_path: Path, on_path: None) -> None:
    base = write_base(ranks, tmp_path)
    texts = [["Be quick", f"Guess {i}", str(i % 7), f"No, try {i % 10}", str(i % 10)] for i in range(40)]
    dialogues = [[{"role": r, "content": t} for r, t in zip(ROLES, said, strict=True)] for said in texts]
    (base / "games.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in dialogues))
    own = [f"data.dialogues=['{base}/games.jsonl']", "task.demonstrations=0", "task.eval_prompts=1", "train.steps=120"]
    argv = [str(base / "sft.toml"), *own]
    assert set(ranks(1).run("posttrain.sft:main", process_group=False, timeout=300, argv=argv)) == {0}
    task = {
        "kind": "verifiers",
        "name": "game",
        "max_new_tokens": 8,
        "eval_prompts": 2,
        "verifiers": {"taskset": TASKSET, "seconds": 120.0, "heldout_share": 0.3},
    }
    for name, more in (("grpo", {}), ("ppo", {"epochs": 2})):
        sections: dict[str, Any] = {name: {"group_size": 4}, "rl": {"record": str(base / name / "record"), **more}}
        config = rl_config(base, name, 3, (16, 8), 112, task=task, checkpoint={"every": 1, "keep": 9}, **sections)
        (base / f"{name}.toml").write_bytes(toml(config))

    def train(*options: str, command: str = "grpo") -> None:
        """Runs the command in the folder of the environment's module, as a user does."""
        argv = [*CLI, command, str(base / f"{command}.toml"), *options]
        subprocess.run(argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)

    train()
    steps = [line for line in metrics(base / "grpo") if "loss" in line]
    assert len(steps) == 3 and steps[-1]["turns"] > 1 and steps[-1]["logprob_difference"] < 1e-5
    assert {"reward/found", "reward/quick"} <= steps[-1].keys()
    chat, tasks = ChatFormat(Tokenizer.load(base / "tokenizer/tokenizer.model")), own_tasks()
    by_prompt = {task.data.prompt: task for task in tasks.values()}
    values = set()
    for number in range(3):
        rollout = rollout_file.read(base / "grpo/record", number, "").rollout
        for i in range(len(rollout)):
            length, parts = int(rollout.lengths[i]), turns_of(rollout, i, chat)
            np.testing.assert_array_equal(
                rollout.mask[i][:length], [by_model for by_model, tokens in parts for _ in tokens][1:]
            )
            assert not rollout.mask[i][length:].any()
            if not rollout.stopped[i]:
                assert rollout.scores[i] == 0
                continue
            messages = messages_in(chat, [token for _, tokens in parts for token in tokens])
            value, scores = own_scores(by_prompt[messages[1][1]], messages)
            assert rollout.scores[i] == np.float32(value)
            assert {name: rollout.arrays[f"reward/{name}"][i] for name in scores} == {
                name: np.float32(score) for name, score in scores.items()
            }
            values.add(value)
    assert len(values) > 2, "all episodes have the same score, so nothing is tested"
    # A run that ends after its first step and goes on has the same weights; PPO's does so within a rollout.
    train(command="ppo")
    steps = [line for line in metrics(base / "ppo") if "loss" in line]
    assert len(steps) == 3 and all(line["turns"] > 1 and line["value_grad_norm"] > 0 for line in steps)
    for command in ("grpo", "ppo"):
        again = [f"run.dir={base}/again_{command}", f"rl.record={base}/again_{command}/record"]
        train(*again, "train.steps=1", command=command)
        train(*again, command=command)
        weights = [storage.read_full(storage.latest(base / name)) for name in (command, f"again_{command}")]
        assert all(np.array_equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
