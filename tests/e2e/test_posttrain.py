"""SFT, then GRPO, by their commands: a tiny model learns to sort, in several layouts and across an interruption."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.loader import toml
from configs.mixture import PlanConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import jinja_template
from posttrain.rl import rollout_file
from pretrain.checkpoint import storage
from pretrain.checkpoint.whole_model import ModelReader
from tests.e2e.posttrain_configs import grpo_config, write_base
from tests.parallel.harness import RankError, Ranks, RanksOf
from tests.parallel.runs import metrics
from tests.shards import write_shard


@pytest.fixture(scope="module")
def base(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer, dialogues and an untrained model, and a config for each command."""
    return write_base(ranks, tmp_path_factory.mktemp("posttrain"))


def call(ranks: Ranks, command: str, base: Path, *overrides: str) -> None:
    argv = [str(base / f"{command}.toml"), *overrides]
    statuses = ranks.run(f"posttrain.{command}:main", process_group=False, timeout=300, argv=argv)
    assert set(statuses) == {0}


def held_out(run_dir: Path) -> dict[str, dict[str, float]]:
    return metrics(run_dir)[-1]["eval"]


@pytest.fixture(scope="module")
def tuned(ranks: RanksOf, base: Path) -> Path:
    """Folder `base` after SFT on two ranks."""
    call(ranks(2), "sft", base, "task.eval_prompts=100")
    return base


def test_sft_learns_answers_and_not_questions(tuned: Path) -> None:
    steps = [line for line in metrics(tuned / "sft") if "loss" in line]
    assert set(steps[-1]["loss_by_source"]) <= {"dialogues", "sort"}
    assert steps[0]["loss"] > 5 > 1 > steps[-1]["loss"]  # 5.7 = ln 301 is the loss of a uniform guess
    result = held_out(tuned / "sft")
    assert result["sort"]["loss"] < 0.8 and result["dialogues"]["loss"] < 1
    assert 0.3 < result["sort answers"]["sampled"] < 0.85 and result["sort answers"]["greedy"] > 0.6
    assert (tuned / "sft" / "chat_template.jinja").read_text() == jinja_template()


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, "tp=2"),
        (2, "pp=2"),
        # GRPO, below, is compared in these layouts too.
        *(pytest.param(*p, marks=pytest.mark.full) for p in ((1, "tp=1"), (2, "cp=2"), (2, "zero=3"))),
    ],
)
def test_sft_is_the_same_in_any_layout(ranks: RanksOf, tuned: Path, tmp_path: Path, world: int, parallel: str) -> None:
    call(ranks(world), "sft", tuned, f"run.dir={tmp_path}", f"parallel.{parallel}", "train.steps=3")
    expected = [line["loss"] for line in metrics(tuned / "sft")[:3]]
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def rewarded(ranks: RanksOf, tuned: Path) -> Path:
    """Folder `base` after GRPO on two ranks."""
    call(ranks(2), "grpo", tuned, "task.eval_prompts=100")
    return tuned


def test_grpo_raises_held_out_accuracy(rewarded: Path) -> None:
    before, after = (held_out(rewarded / run)["sort answers"] for run in ("sft", "grpo"))
    assert after["sampled"] >= before["sampled"] + 0.1
    steps = [line for line in metrics(rewarded / "grpo") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert all(line["logprob_difference"] < 1e-4 and line["clipped"] == 0 for line in steps)
    assert all(0 <= line["equal_reward_groups"] < 1 and line["unscorable"] == 0 for line in steps)


@pytest.mark.parametrize(("world", "parallel"), [(1, "tp=1"), (2, "tp=2"), (2, "pp=2"), (2, "cp=2"), (2, "zero=3")])
def test_grpo_is_the_same_in_any_layout(
    ranks: RanksOf, rewarded: Path, tmp_path: Path, world: int, parallel: str
) -> None:
    call(ranks(world), "grpo", rewarded, f"run.dir={tmp_path}", f"parallel.{parallel}", "train.steps=3")
    ours, expected = ([line for line in metrics(run) if "loss" in line] for run in (tmp_path, rewarded / "grpo"))
    for line, other in zip(ours, expected[:3], strict=True):
        assert line["reward"] == other["reward"] and line["completion_tokens"] == other["completion_tokens"]
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_stopped_grpo_run_goes_on_bit_identically(ranks: RanksOf, rewarded: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    call(ranks(2), "grpo", rewarded, f"run.dir={straight}", "train.steps=4")
    call(ranks(2), "grpo", rewarded, f"run.dir={stopped}", "train.steps=2")
    call(ranks(2), "grpo", rewarded, f"run.dir={stopped}", "train.steps=4")
    losses = [[line for line in metrics(run) if "loss" in line] for run in (straight, stopped)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    weights = [storage.read_full(storage.latest(run)) for run in (straight, stopped)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


SEVERAL = ["rl.rollout_batch=2", "rl.epochs=2", "rl.kl=loss", "rl.correction=truncate", "rl.max_draws=3"]


@pytest.fixture(scope="module")
def several(ranks: RanksOf, rewarded: Path) -> Path:
    """Folder of a run of seven steps with four updates a rollout, and the reference, on two ranks."""
    run = rewarded / "several"
    options = ["checkpoint.every=3", "checkpoint.keep=9", f"rl.record={rewarded}/record", "train.steps=7"]
    call(ranks(2), "grpo", rewarded, f"run.dir={run}", *options, *SEVERAL)
    return run


def steps_of(run: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_s", "memory_bytes", "save_copy_s", "mfu")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics(run) if "loss" in line]


def test_several_updates_move_the_policy_away_from_its_rollout(several: Path) -> None:
    steps = steps_of(several)
    assert len({line["reward"] for line in steps[:4]}) == 1 != len({line["reward"] for line in steps})  # two rollouts
    moved = [line["kl_rollout"] for line in steps]
    assert moved[0] < 1e-9 < 1e-6 < moved[3] and moved[4] < 1e-9 < moved[6]
    assert all(line["logprob_difference"] < 1e-5 for line in steps)  # sampler and trainer, whatever the updates
    assert steps[0]["kl_reference"] < 1e-9 < steps[4]["kl_reference"]
    assert steps[0]["drawn_groups"] >= 16 and steps[0]["equal_reward_groups"] > 0


@pytest.mark.parametrize("gone", [(6, 7), pytest.param((7,), marks=pytest.mark.full)])
def test_a_run_killed_in_the_middle_of_a_rollout_goes_on_bit_identically(
    ranks: RanksOf, rewarded: Path, several: Path, tmp_path: Path, gone: tuple[int, ...]
) -> None:
    """Makes the state after a kill: checkpoints up to a step in a rollout, and rollouts that came later."""
    run = shutil.copytree(several, tmp_path / "killed")
    for step in gone:
        shutil.rmtree(storage.directory(run, step))
    call(ranks(2), "grpo", rewarded, f"run.dir={run}", "checkpoint.every=3", "train.steps=7", *SEVERAL)
    assert steps_of(run) == steps_of(several)
    weights = [storage.read_full(storage.directory(r, 7)) for r in (run, several)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.full
def test_recorded_rollouts_are_trained_on_without_sampling(
    ranks: RanksOf, rewarded: Path, several: Path, tmp_path: Path
) -> None:
    options = [*SEVERAL, f"rl.replay={rewarded}/record", "train.steps=7"]
    call(ranks(2), "grpo", rewarded, f"run.dir={tmp_path}", *options)
    assert steps_of(tmp_path) == steps_of(several)


@pytest.mark.full
def test_sampling_and_training_that_take_turns_have_the_numbers_of_one_run(
    ranks: RanksOf, rewarded: Path, several: Path, tmp_path: Path
) -> None:
    """Runs a command for each turn: sampling of one rollout on one rank, or training on it on two."""
    run, record = f"run.dir={tmp_path}/run", tmp_path / "record"
    for steps in (4, 7):
        call(ranks(1), "grpo", rewarded, run, *SEVERAL, f"rl.record={record}", "train.steps=7", "--rollouts-only=1")
        call(ranks(2), "grpo", rewarded, run, *SEVERAL, f"rl.replay={record}", f"train.steps={steps}")
    assert rollout_file.numbers(record) == [0, 1]
    assert [step["reward"] for step in steps_of(tmp_path / "run")] == [step["reward"] for step in steps_of(several)]
    for line, other in zip(steps_of(tmp_path / "run"), steps_of(several), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(2, ["parallel.tp=2", "rl.sampler=split"], id="tp2_split"),
        pytest.param(2, ["parallel.pp=2"], id="pp2"),
        pytest.param(1, [], id="one", marks=pytest.mark.full),
        pytest.param(2, ["parallel.tp=2"], id="tp2", marks=pytest.mark.full),
    ],
)
def test_rollouts_are_the_same_in_any_layout(
    ranks: RanksOf, rewarded: Path, several: Path, tmp_path: Path, world: int, options: list[str]
) -> None:
    call(ranks(world), "grpo", rewarded, f"run.dir={tmp_path}", *options, *SEVERAL, "train.steps=4")
    ours, theirs = (rollout_file.read(folder, 0, "").rollout for folder in (tmp_path / "rollouts", rewarded / "record"))
    for name, array in theirs.arrays.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(ours.arrays[name], array, atol=1e-5, rtol=0)
        else:
            np.testing.assert_array_equal(ours.arrays[name], array)
    difference = np.abs(ours.old_logprobs - ours.rollout_logprobs)[ours.mask]
    assert difference.max() < 1e-5
    for line, other in zip(steps_of(tmp_path), steps_of(several)[:4], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.fixture(scope="module")
def criticized(ranks: RanksOf, tuned: Path) -> Path:
    """Folder of a PPO run of five steps with two updates a rollout, on two ranks."""
    tree = grpo_config(tuned)
    del tree["grpo"]
    (tuned / "ppo.toml").write_bytes(toml(tree | {"rl": {"epochs": 2}}))
    run = tuned / "ppo"
    call(ranks(2), "ppo", tuned, f"run.dir={run}", "checkpoint.every=3", "checkpoint.keep=9", "train.steps=5")
    return run


def test_ppo_trains_a_critic_beside_the_policy(criticized: Path) -> None:
    steps = steps_of(criticized)
    assert all(line["value_grad_norm"] > 0 and line["logprob_difference"] < 1e-5 for line in steps)
    losses = [line["value_loss"] for line in steps]
    assert losses[1] < losses[0] and losses[3] < losses[2]  # the second pass over the same rollout
    assert abs(steps[0]["kl_to_reference"]) < 1e-5 < abs(steps[4]["kl_to_reference"])
    critic = storage.read_full(storage.directory(criticized, 5) / "critic")
    assert critic["value_head.weight"].shape == (1, 64)
    assert set(storage.read_full(storage.directory(criticized, 5))) == {*critic, "lm_head.weight"} - {
        "value_head.weight"
    }


def test_a_killed_ppo_run_goes_on_bit_identically(
    ranks: RanksOf, tuned: Path, criticized: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(criticized, tmp_path / "killed")
    shutil.rmtree(storage.directory(run, 5))
    call(ranks(2), "ppo", tuned, f"run.dir={run}", "checkpoint.every=3", "train.steps=5")
    assert steps_of(run) == steps_of(criticized)
    for part in ("", "critic"):
        weights = [storage.read_full(storage.directory(r, 5) / part) for r in (run, criticized)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_text_of_pretraining_is_learnt_in_the_same_steps(ranks: RanksOf, tuned: Path, criticized: Path) -> None:
    """Trains PPO-ptx (Ouyang et al. 2022) on one rank and on two, and with a coefficient that drowns the rewards."""
    shard = [{"text": "I am fine, thank you. " * 30, "id": str(i), "metadata": {}} for i in range(8)]
    write_shard(tuned / "prose.jsonl.zst", shard)
    for split in ("train", "heldout"):
        store = tuned / "tokens" / split / "prose" / "00000"
        build(tuned / "prose.jsonl.zst", store, Tokenizer.load(tuned / "tokenizer"))
    plan = PlanConfig(seq_length=24, samples=40, seed=1, weights={"prose": 1.0}, max_epochs=9)
    build_plan(tuned / "tokens", tuned / "tokenizer", tuned / "plan", plan)
    runs, text = {}, (f"ppo.text_plan={tuned}/plan", "ppo.text_rows=64")
    for name, world, coef, steps in (("one", 1, 1.0, 2), ("two", 2, 1.0, 2), ("text", 2, 100.0, 6)):
        own = (f"run.dir={tuned}/ptx_{name}", f"ppo.text_coef={coef}", f"train.steps={steps}")
        call(ranks(world), "ppo", tuned, *own, *text)
        runs[name] = steps_of(tuned / f"ptx_{name}")
    first = {name: lines[0] for name, lines in runs.items()}
    assert first["one"]["ptx_loss"] == pytest.approx(first["text"]["ptx_loss"], rel=1e-5)
    assert first["one"]["value_loss"] == pytest.approx(steps_of(criticized)[0]["value_loss"], rel=1e-4)
    for name in ("loss", "grad_norm", "ptx_loss"):
        assert first["one"][name] == pytest.approx(first["two"][name], rel=1e-4)
    assert runs["text"][-1]["ptx_loss"] < first["text"]["ptx_loss"] - 0.05


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, "tp=2"), *(pytest.param(*p, marks=pytest.mark.full) for p in ((1, "tp=1"), (2, "pp=2"), (2, "cp=2")))],
)
def test_ppo_is_the_same_in_any_layout(
    ranks: RanksOf, tuned: Path, criticized: Path, tmp_path: Path, world: int, parallel: str
) -> None:
    call(ranks(world), "ppo", tuned, f"run.dir={tmp_path}", f"parallel.{parallel}", "train.steps=2")
    for line, other in zip(steps_of(tmp_path), steps_of(criticized), strict=False):
        for name in ("loss", "grad_norm", "value_loss", "value_grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.full
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("grpo", ["rl.kl=loss", "rl.sampler=split", "adapter.rank=4"]),
        ("grpo", ["rl.kl=reward", "adapter.kind=p_tuning_v2", "adapter.virtual_tokens=4"]),
        ("ppo", ["adapter.kind=dora", "adapter.rank=4"]),
    ],
)
def test_adapters_are_rewarded_and_measured_against_their_base(
    ranks: RanksOf, tuned: Path, tmp_path: Path, command: str, options: list[str]
) -> None:
    """Compares two ranks of tp with one, and a run that goes on with one that was never stopped."""
    tree = grpo_config(tuned)
    if command == "ppo":
        del tree["grpo"]
    (tmp_path / f"{command}.toml").write_bytes(toml(tree))
    own = ["optimizer.lr=5e-3", "rl.epochs=2", "rl.kl_coef=0.1", *options]
    layouts = {"one": (1, ["rl.sampler=whole"]), "two": (2, ["parallel.tp=2"])}
    for name, (world, layout) in layouts.items():
        more = ["train.steps=3", *(one for one in own if world > 1 or "sampler" not in one), *layout]
        call(ranks(world), command, tmp_path, f"run.dir={tmp_path / name}", *more)
    one, two = (steps_of(tmp_path / name) for name in layouts)
    for line, other in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", *(["value_loss"] if command == "ppo" else [])):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    assert all(line["logprob_difference"] < 1e-5 for line in two)
    starts_as_base = "p_tuning_v2" not in " ".join(options)
    assert (abs(two[0]["kl_to_reference"]) < 1e-5) == starts_as_base and abs(two[2]["kl_to_reference"]) > 1e-5
    call(ranks(2), command, tmp_path, f"run.dir={tmp_path / 'two'}", "train.steps=4", *own, "parallel.tp=2")
    call(ranks(2), command, tmp_path, f"run.dir={tmp_path / 'straight'}", "train.steps=4", *own, "parallel.tp=2")
    assert steps_of(tmp_path / "two") == steps_of(tmp_path / "straight")
    final = storage.directory(tmp_path / "two", 4)
    names = set(storage.read_manifest(final)["parameters"])
    assert names and all(".adapter." in name for name in names)
    if command == "ppo":
        assert set(storage.read_manifest(final / "critic")["parameters"]) == names | {"value_head.weight"}
        with ModelReader(final / "critic") as critic:
            assert critic.read("value_head.weight").shape == (1, 64) and "lm_head.weight" not in critic.shapes


@pytest.mark.parametrize(
    ("command", "overrides", "words"),
    [
        (
            "grpo",
            ["train.global_batch_size=8", "train.micro_batch_size=4"],
            r"8 over 2 data-parallel ranks is 4 samples each.*global_batch_size could be 16",
        ),
        (
            "grpo",
            ["train.global_batch_size=60", "train.micro_batch_size=1"],
            r"60 over 2 data-parallel ranks is 30 samples each.*global_batch_size could be .*64",
        ),
        ("grpo", ["grpo.max_logprob_difference=1e-12"], r"differ by .* nats a token.*max_logprob_difference = 1e-12"),
        ("grpo", ["grpo.dialect=ppo"], r"grpo\.dialect = 'ppo'"),
        ("grpo", ["grpo.dialect=gspo", "parallel.cp=2"], r"parallel\.cp = 2 divides sequences.*set parallel\.cp=1"),
        ("grpo", ["init.run=nowhere"], r"init\.run = 'nowhere'"),
        ("sft", ["init.tokenizer=nowhere"], r"init\.tokenizer = 'nowhere'"),
        ("sft", ["data.dialogues=[]", "task.demonstrations=0"], "nothing to train on"),
        ("sft", ["data.dialogues=['gone.jsonl']"], r"gone\.jsonl, which is no file"),
        ("sft", ["train.seq_length=16"], r"dialogues were set aside.*too_long"),
        ("sft", ["task.max_new_tokens=3"], r"task\.max_new_tokens = 3 cuts right answers.*max_new_tokens=4"),
        ("grpo", ["train.seq_length=12"], r"do not fit into train\.seq_length = 12; set train\.seq_length="),
        ("grpo", ["task.max_new_tokens=200", "train.seq_length=300"], r"beyond the 128 tokens that the model"),
    ],
)
def test_mistakes_are_named(
    ranks: RanksOf, rewarded: Path, tmp_path: Path, command: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(RankError, match=words):
        call(ranks(2), command, rewarded, f"run.dir={tmp_path}", *overrides)
    assert not list(tmp_path.iterdir())
