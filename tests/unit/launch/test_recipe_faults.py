"""Recipes that cannot run, or whose results are damaged: each is told in one sentence."""

from pathlib import Path

import pytest

from configs.loader import ConfigError, Failure, validate
from configs.recipe import RecipeConfig
from configs.run_lock import locked
from launch import recipe
from launch.recipe_results import describe_export, describe_training


def test_gates_are_on_what_training_measures(tmp_path: Path) -> None:
    gate = {"metric": "loss", "at_most": 1.0}
    stage = {"command": "data run", "config": "configs/data/demo.toml", "gates": [gate]}
    with pytest.raises(
        ConfigError,
        match=r"stages.a.gates: `trivium data run` measures nothing that a gate could be on; leave them out",
    ):
        recipe.run_recipe(validate(RecipeConfig, {"dir": str(tmp_path), "stages": {"a": stage}}))


def test_two_recipes_do_not_run_in_one_folder(tmp_path: Path) -> None:
    stages = {"a": {"command": "data baselines", "config": "configs/data/demo.toml"}}  # of a data run that never ran
    tree = validate(RecipeConfig, {"dir": str(tmp_path / "recipe"), "stages": stages})
    with locked(tmp_path / "recipe", recipe.take), pytest.raises(ConfigError, match="another recipe is running in"):
        recipe.run_recipe(tree)
    assert recipe.run_recipe(tree) == 1


def test_damaged_results_are_left_out_or_told(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 3.0, "tokens": 5}',
        '{"step": 2, "lo',
        '{"a": }',
        "[1]",
        '{"step": 3, "loss": 2.0, "tokens": 9}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    assert describe_training(tmp_path) == ("3 steps, 0.00M tokens", "loss 3.00 → 2.00")
    (tmp_path / "trivium_export.json").write_text('{"checks": ')
    with pytest.raises(Failure, match=rf"json is damaged; remove {tmp_path} and run the recipe again"):
        describe_export(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    {
        "no such command": ({"command": "sfft"}, r"stages.b.command = 'sfft' is none of data run, .*sft, .*grpo"),
        "unknown stage": ({"set": ["init.run={c}"]}, r"'c', which does not exist; stages before it: a"),
        "itself": ({"set": ["init.run={b}"]}, r"'b', which comes later in the file; stages before it: a"),
        "no override": ({"set": ["steps"]}, r"'steps' is no override; write it as"),
        "no bound": ({"gates": [{"metric": "loss"}]}, r"'loss' has no bound; set at_least, at_most, or both"),
        "a folder twice": (
            {"folder": "a"},
            r"stages.b writes into .*/a, as stages.a does; set stages.b.folder to another name",
        ),
        "a folder of its own": (
            {"set": ["run.dir=x"]},
            r"stages.b.set has run.dir=x, .* set stages.b.folder to choose",
        ),
        "no config": ({"config": "none.toml"}, r"stages.b.config = 'none.toml' does not exist; name the stage's"),
    }.values(),
)
def test_mistakes_in_a_recipe_are_found_before_it_runs(changes: dict, message: str, tmp_path: Path) -> None:
    stage = {"command": "sft", "config": "configs/posttrain/demo_sft.toml"}
    tree = {"dir": str(tmp_path), "stages": {"a": stage, "b": stage | changes}}
    with pytest.raises(ConfigError, match=message):
        recipe.run_recipe(validate(RecipeConfig, tree))
    assert not list(tmp_path.iterdir())


def test_a_later_stage_is_held_against_its_ranks_and_the_model_that_reaches_it(tmp_path: Path) -> None:
    """Checks a second stage that starts from the first one's model, which has two layers and does not exist yet."""
    begin = ["train.global_batch_size=6", "train.micro_batch_size=1", "model.num_layers=2"]
    stages = {
        "a": {"command": "train", "config": "configs/pretrain/demo.toml", "set": begin},
        "b": {"command": "sft", "config": "configs/posttrain/demo_sft.toml", "set": ["init.run={a}"], "ranks": 4},
    }

    def refused(more: list[str]) -> str:
        tree = {"dir": str(tmp_path), "ranks": 3, "stages": {**stages, "b": {**stages["b"], "more": more}}}
        with pytest.raises(ConfigError) as error:
            recipe.run_recipe(validate(RecipeConfig, tree), dry_run=True)
        return str(error.value)

    batch = ["train.global_batch_size=8", "train.micro_batch_size=2"]
    assert refused([*batch, "parallel.pp=4"]).startswith("stages.b on 4 ranks: parallel.pp * parallel.vpp = 4 * 1 = 4")
    batch[1] = "train.micro_batch_size=4"
    assert refused(batch).startswith("stages.b on 4 ranks: train.global_batch_size = 8 is not a multiple of dp")


@pytest.mark.parametrize(
    ("command", "config", "sets", "ranks", "words"),
    [
        ("ppo", "demo_ppo", ["ppo.text_plan=x", "ppo.text_rows=3"], 2, r"ppo\.text_rows = 3 do not fill micro-batches"),
        ("ppo", "demo_ppo", ["parallel.zero=2"], 2, r"policy and critic are two models in one process, .*ZeRO stage 1"),
        ("grpo", "demo_grpo", ["rl.sampler=split", "parallel.sp=true", "parallel.tp=2"], 2, r"rl\.sampler = 'split'"),
        ("grpo", "demo_grpo", ["grpo.dialect=gspo", "parallel.cp=2"], 2, r"grpo\.dialect = 'gspo' takes; set parallel"),
    ],
)
def test_a_later_stage_is_held_against_its_method(
    command: str, config: str, sets: list[str], ranks: int, words: str, tmp_path: Path
) -> None:
    stages = {
        "a": {"command": "train", "config": "configs/pretrain/demo.toml"},
        "b": {"command": command, "config": f"configs/posttrain/{config}.toml", "set": ["init.run={a}", *sets]},
    }
    tree = {"dir": str(tmp_path), "ranks": ranks, "stages": stages}
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=rf"^stages\.b on {ranks} ranks: .*{words}"):
            recipe.run_recipe(validate(RecipeConfig, tree), dry_run)
    assert not list(tmp_path.iterdir())
