"""`trivium rm` as a whole: a run, its continuation and report, scores, refusals, and what it learns."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.loader import ConfigError
from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.tokenizer_training import train as train_tokenizer
from posttrain import grpo, rm, sft
from posttrain.rewards.dialogue_scorer import RewardModel, open_scorer
from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.runs import metrics
from tests.shards import write_shard
from tests.training_configs import write_training_config

VOCAB = 301
MODEL = {"vocab_size": VOCAB, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_heads": 4}


def pairs(count: int) -> list[dict[str, str]]:
    """Returns pairs of three digits in order, and the same digits in another order."""
    draw, found = random.Random(1), []
    while len(found) < count:
        digits = "".join(draw.choices("0123456789", k=3))
        other, right = "".join(draw.sample(digits, 3)), "".join(sorted(digits))
        if other != right:
            found.append({"prompt": f"Sort {digits}", "chosen": right, "rejected": other})
    return found


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an untrained language model, pairs and a config."""
    base = tmp_path_factory.mktemp("reward_model")
    text = {"text": "Sort 1234567890, how are you?\n" * 40, "id": "0", "metadata": {}}
    shard = write_shard(base / "text.jsonl.zst", [text])
    train_tokenizer([shard], base / "tokenizer", TokenizerConfig(vocab_size=VOCAB))
    (base / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs(4000))))
    write_training_config(
        base / "rm.toml",
        base / "rm",
        3,
        (4, 2),
        64,
        init={"run": str(base / "init")},
        data={"files": [str(base / "pairs.jsonl")], "heldout_share": 0.1},
        optimizer={"lr": 2e-3, "weight_decay": 0.0},
        schedule={"warmup_steps": 3},
        eval={"every": 1000},
    )
    ranks(1).run(
        "tests.parallel.workers.posttraining:save_untrained",
        process_group=False,
        run_dir=str(base / "init"),
        model=MODEL | {"num_kv_heads": 2, "tie_embeddings": True},
        tokenizer=str(base / "tokenizer/tokenizer.model"),
    )
    return base


@pytest.mark.full
def test_a_run_continues_in_another_layout_and_gives_scores_alone(ranks: RanksOf, base: Path) -> None:
    argv, options = [str(base / "rm.toml")], {"process_group": False, "timeout": 120}
    command = "tests.parallel.workers.posttraining:command"
    (first,) = ranks(1).run(command, **options, module="posttrain.rm", argv=[*argv, "data.heldout_share=0.01"])
    assert first["status"] == 0 and "value_head.weight is not in" in first["said"]
    more = [*argv, "data.heldout_share=0.01", "train.steps=4", "parallel.tp=2"]
    found = ranks(2).run(command, **options, module="posttrain.rm", argv=more)
    assert [result["status"] for result in found] == [0, 0] and "going on from" in found[0]["said"]
    last = metrics(base / "rm")[-1]["eval"]
    assert {"accuracy", "calibration_error", "loss"} <= last["pairs"].keys()
    bins = [values for name, values in last.items() if name.startswith("confidence")]
    assert sum(values["share"] for values in bins) == pytest.approx(1)
    assert "calibration error" in (base / "rm/report.html").read_text()

    scorer = RewardModel.open(base / "rm")
    dialogues = [
        [{"role": "user", "content": "Sort 213"}, {"role": "assistant", "content": text}]
        for text in ("123", "3", "213")
    ]
    alone = [open_scorer(str(base / "rm"))([dialogue])[0] for dialogue in dialogues]
    assert scorer.scores(dialogues) == pytest.approx(alone, abs=1e-6) and len(set(alone)) == 3
    for module, name in ((sft, "demo_sft"), (grpo, "demo_grpo")):
        with pytest.raises(ConfigError, match="is a reward model, which writes no text; start from a language model"):
            args = [f"configs/posttrain/{name}.toml", f"init.run={base / 'rm'}", f"run.dir={base / name}", "--dry-run"]
            module.main(args)
    with pytest.raises(ConfigError, match=r"with 1 values of each token, and .* needs 2 .wrong, right."):
        kind = ["reward_model.kind=process", f"run.dir={base / 'other'}", f"init.run={base / 'rm'}", "--dry-run"]
        rm.main([*argv, *kind])
    with pytest.raises(ConfigError, match="is a language model, which scores nothing"):
        RewardModel.open(base / "init")


@pytest.mark.full
def test_a_small_model_learns_which_digits_are_sorted(ranks: RanksOf, base: Path) -> None:
    argv = [str(base / "rm.toml"), f"run.dir={base / 'long'}", "train.steps=400", "train.global_batch_size=16"]
    argv += ["train.micro_batch_size=8", "eval.rows=64", "reward_model.centring=0.01"]
    (status,) = ranks(1).run("posttrain.rm:main", process_group=False, timeout=400, argv=argv)
    found = metrics(base / "long")[-1]["eval"]["pairs"]
    assert status == 0 and found["accuracy"] > 0.9 and found["calibration_error"] < 0.1
    assert not torch.isnan(torch.tensor(list(found.values()))).any()
    assert storage.steps(base / "long")[-1] == 400


@pytest.mark.full
def test_rewards_stay_those_of_the_checkpoint_that_a_run_began_with(ranks: RanksOf, base: Path) -> None:
    """Trains the reward model further: a run keeps the checkpoint that it began with, and names it if it is gone."""
    prompts = [{"prompt": pair["prompt"], "answer": pair["chosen"]} for pair in pairs(60)]
    (base / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    write_training_config(
        base / "grpo.toml",
        base / "grpo",
        1,
        (8, 8),
        64,
        init={"run": str(base / "init")},
        task={
            "kind": "file",
            "files": [str(base / "prompts.jsonl")],
            "max_new_tokens": 6,
            "eval_prompts": 2,
            "rewards": {"judge": {"kind": "reward_model", "model": str(base / "judge")}},
        },
        grpo={"group_size": 4},
        optimizer={"lr": 1e-3},
        schedule={"kind": "cosine"},
    )
    judge, key = base / "judge", "task.rewards.judge.model"

    def call(module: str, *argv: str) -> dict[str, Any]:
        command = "tests.parallel.workers.posttraining:command"
        return dict(*ranks(1).run(command, process_group=False, timeout=120, module=f"posttrain.{module}", argv=argv))

    trained = [
        str(base / "rm.toml"),
        f"run.dir={judge}",
        "checkpoint.keep=1",
        "data.heldout_share=0.01",
        "schedule.warmup_steps=0",
    ]
    assert call("rm", *trained, "train.steps=2")["status"] == 0
    config = str(base / "grpo.toml")
    begun = call("grpo", config)
    assert begun["status"] == 0, begun["error"]
    assert call("rm", *trained, "train.steps=4")["status"] == 0
    assert storage.steps(judge) == [2, 4], "the first is needed, so it is not pruned"
    assert call("grpo", config, "train.steps=2")["status"] == 0
    manifests = [storage.read_manifest(storage.directory(base / "grpo", step)) for step in (1, 2)]
    used = [manifest["source"]["rewards"]["task.rewards.judge"] for manifest in manifests]
    assert used[0] == used[1] and used[0]["checkpoint"] == str(storage.directory(judge, 2))

    shutil.rmtree(storage.directory(judge, 2))
    refused = call("grpo", config, "train.steps=3")
    assert refused["status"] == 2 and f"{key} = '{judge}' was {judge}/checkpoints/step_2 when" in refused["error"]
    named = refused["error"].split("such as ")[1].replace("step_N", "step_4")
    done = call("grpo", config, "train.steps=3", named)
    assert done["status"] == 0 and f"{key} {judge} -> {judge}/checkpoints/step_4 from step 2 on" in done["said"]
