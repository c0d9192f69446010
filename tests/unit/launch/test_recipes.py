"""The recipes in configs/recipes: their manifests, their stages' configs, and the data that they use."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, load, validate
from configs.recipe import RecipeConfig
from configs.rewards import RewardConfig
from configs.rl import PPOConfig
from launch import recipe
from launch.recipe_inputs import result_of
from launch.recipe_stages import stages_of
from posttrain.rewards.attempt import Attempt, Problem
from posttrain.rewards.reward_registry import make_rewards

FOLDER, DATA = Path("configs/recipes"), Path("data/recipes")
KINDS = {"sort": "exact", "countdown": "expression", "form": "instructions"}
STAGES = {  # commands, and what the last stage begins with
    "r1": (
        ("sft", "grpo", "sample", "sft", "rm", "grpo", "sample", "train", "sft"),
        ["runs/r1/student_base", "runs/r1/answers"],
    ),
    "instructgpt": (
        ("sft", "rm", "ppo"),
        ["runs/instructgpt/sft", "runs/instructgpt/reward_model", "runs/demo/data/plan"],
    ),
    "qwen3": (
        ("sft", "grpo", "sample", "sft", "grpo", "sample", "train", "distill", "distill"),
        ["runs/qwen3/off_policy", "runs/qwen3/general_rl"],
    ),
}


def records(name: str, folder: Path = DATA) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress((folder / f"{name}.jsonl.gz").read_bytes()).splitlines()]


@pytest.mark.parametrize("name", STAGES)
def test_a_dry_run_checks_all_configs_and_says_what_each_stage_reads_and_writes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commands, last_begins = STAGES[name]
    path = FOLDER / f"{name}.toml"
    assert recipe.main([str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    config = load(RecipeConfig, path)
    assert tuple(stage.command for stage in config.stages.values()) == commands
    assert printed.count("\n  to: runs/") == printed.count("\n  $ ") == len(commands)
    begins = printed.rsplit("  from: ", 1)[1].splitlines()[0]
    assert [part.split(")")[0] for part in begins.split("(")[1:]] == last_begins
    assert "  data: data/recipes/" in printed
    assert all(stage.about in printed for stage in config.stages.values())
    # No config is left over, and none is without the stage that it is for.
    named = {stage.config for stage in config.stages.values()}
    assert {str(file) for file in (FOLDER / name).glob("*.toml")} == {one for one in named if f"/{name}/" in one}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('stages.cold_start.more=["train.stepz=5"]', r"stages.cold_start: .*unknown key 'train.stepz'"),
        ('stages.student.more=["train.steps=0"]', r"stages.student: .*train.steps = 0"),
        ('stages.student_base.more=["model.num_heads=7"]', r"stages.student_base: .*num_heads"),
        ('stages.sft.more=["init.run={later}"]', r"stages.sft.more: .*the stage 'later', which does not exist"),
        ("inputs.sft=runs/x", r"inputs.sft has the name of a stage"),
        (
            'stages.sft.set=["run.dir=x"]',
            r"stages.sft.set has run.dir=x, and a recipe's stage writes into a folder of the recipe; leave it out",
        ),
        ("stages.chosen.config=none.toml", r"stages.chosen.config = 'none.toml' does not exist"),
    ],
)
def test_a_mistake_in_any_stage_is_said_before_the_first_one(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe.main([str(FOLDER / "r1.toml"), "--dry-run", override])


def test_an_input_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [str(FOLDER / "r1.toml"), f"dir={tmp_path}/r1", f"inputs.plan={tmp_path}"]
    told = rf"inputs.model = '{tmp_path}/none' does not exist; make it first, or set (inputs\.model)=FOLDER"
    with pytest.raises(ConfigError, match=told):
        recipe.main([*args, f"inputs.model={tmp_path}/none"])
    monkeypatch.setattr(recipe, "run_stages", lambda *args: 0)
    for folder in ("none", "other"):
        (tmp_path / folder).mkdir()
        assert recipe.main([*args, f"inputs.model={tmp_path}/{folder}"]) == 0


def test_a_hugging_face_folder_is_known_by_its_content(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("config.json", "model.safetensors", "tokenizer.json", "a.jinja")}
    for file in files.values():
        file.write_bytes(b"{}")
    found = result_of(tmp_path)
    for file in files.values():
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.write_bytes(b"[]")
        os.utime(file, ns=times)
        assert result_of(tmp_path) != found, file.name
        file.write_bytes(b"{}")
        assert result_of(tmp_path) == found, "with the same content it is the same, whenever that was written"


def test_a_result_is_made_from_inputs_and_data_too(tmp_path: Path) -> None:
    overrides = [f"dir={tmp_path}/r1", f"inputs.model={tmp_path}/model"]
    first = tmp_path / "model/checkpoints/step_5/manifest.json"
    first.parent.mkdir(parents=True)
    first.write_text("{}")
    cold = stages_of(load(RecipeConfig, FOLDER / "r1.toml", overrides))[0]
    before = cold.made_from()
    assert before["the input model"] == result_of(tmp_path / "model") is not None
    assert "the data data/recipes/sort.jsonl.gz" in before and not any("form" in name for name in before)
    newer = tmp_path / "model/checkpoints/step_10/manifest.json"
    newer.parent.mkdir()
    newer.write_text("[]")
    assert cold.changed_since({"made_from": before}) == ["the input model"]
    old = {**before, "the data data/recipes/sort.jsonl.gz": "another", "the input model": result_of(tmp_path / "model")}
    assert cold.changed_since({"made_from": old}) == ["the data data/recipes/sort.jsonl.gz"]


def test_the_data_are_those_that_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DATA / "make.py", "--out", tmp_path], check=True)
    for name in (*KINDS, "form_pairs"):
        assert records(name) == records(name, tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_both_kinds_of_answers_are_right_by_the_recipes_own_rewards(name: str) -> None:
    found = records(name)
    assert len({record["prompt"] for record in found}) == len(found) == 1500
    problems = [Problem("p", record["prompt"], record["answer"], metadata=record) for record in found]
    for key, after in (("direct", ""), ("reasoned", "</think>")):
        rewards = make_rewards(
            {
                "one": validate(RewardConfig, {"kind": KINDS[name], "after": after}),
                "script": RewardConfig(kind="script"),
            }
        )
        texts = [record[key] for record in found]
        scores = rewards([Attempt(problem, text) for problem, text in zip(problems, texts, strict=True)])
        assert {score.value for score in scores} == {2.0}


def test_each_step_of_a_reasoning_is_true() -> None:
    for record in records("sort"):
        left = record["prompt"].removeprefix("Sort ")
        for line in record["reasoned"].split("\n")[1:-2]:
            assert line == f"{min(left)} of {left}"
            left = left.replace(min(left), "", 1)
        assert not left
    for record in records("countdown"):
        target = int(record["prompt"].split()[1])
        steps = [line.split(" is ") for line in record["reasoned"].split("\n")[1:-2]]
        for expression, said in steps:
            value, verdict = said.split(", ")
            assert eval(expression) == int(value) and verdict == ("yes" if int(value) == target else "no")
        assert [said.endswith("yes") for _, said in steps] == [False] * (len(steps) - 1) + [True]


def test_the_rejected_side_of_a_pair_breaks_an_instruction() -> None:
    by_prompt = {record["prompt"]: record for record in records("form")}
    reward = make_rewards({"one": RewardConfig(kind="instructions")})
    for pair in records("form_pairs"):
        problem = Problem("p", pair["prompt"], metadata=by_prompt[pair["prompt"]])
        good, bad = reward([Attempt(problem, pair["chosen"]), Attempt(problem, pair["rejected"])])
        assert (good.value, bad.value) == (1.0, 0.0), pair


@pytest.mark.parametrize("ranks", [1, 2])
def test_text_beside_ppo_fills_micro_batches_on_every_rank(ranks: int) -> None:
    """Looks at the file itself: the dry run knows the model, and so the layout, only once the demo has run."""
    config = load(PPOConfig, FOLDER / "instructgpt/ppo.toml")
    assert config.ppo.text_rows % (ranks * config.train.micro_batch_size) == 0
