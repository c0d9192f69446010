"""The kind of a config is told by its keys, also where some of them are wrong."""

import importlib
from pathlib import Path

import pytest

from configs.config_kind import command_for, kind_of
from configs.kinds import SCHEMAS
from configs.loader import ConfigError
from configs.starters import starter
from pretrain import train

DEMO = "configs/pretrain/demo.toml"
INIT = '[run]\ndir = "runs/x"\n[init]\nrun = "runs/y"\n'
OF_TRAINING = "[train]\nsteps = 3\nglobal_batch_size = 1\nmicro_batch_size = 1\nseq_length = 8\n[optimizer]\nlr = 1\n"


def test_every_kind_is_told_from_its_own_starter(tmp_path: Path) -> None:
    for kind in SCHEMAS:
        (tmp_path / "config.toml").write_text(starter(kind))
        assert kind_of(tmp_path / "config.toml") == kind


@pytest.mark.parametrize("word", ["train.stpes=3", "train.steps=many", "parallel.tp=3", "modle.x=1", "model=no-such"])
def test_a_mistake_does_not_change_the_kind(word: str) -> None:
    if word == "model=no-such":  # there is no such published model, whatever the kind
        with pytest.raises(ConfigError, match="no-such"):
            kind_of(DEMO, [word])
        return
    assert kind_of(DEMO, ["--world", "4", word]) == "pretrain"


def test_pretraining_from_another_model_needs_no_section_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f'{INIT}{OF_TRAINING}[data]\nplan = "plan"\n')
    assert kind_of(tmp_path / "x.toml") == "pretrain"
    assert kind_of(tmp_path / "x.toml", ['teacher.run="runs/z"', "data.dialogues=[]"]) == "distill"


def test_a_config_that_fits_several_commands_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f'{INIT}{OF_TRAINING}[task]\nname = "sort"\n')
    with pytest.raises(ConfigError, match=r"fit configs of the kinds dpo and ppo and grpo; name the command before it"):
        kind_of(tmp_path / "x.toml")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[tool.ruff]\nline-length = 120\n")
    with pytest.raises(ConfigError, match="are those of no config"):
        kind_of(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="does not exist"):
        kind_of(tmp_path / "y.toml")
    with pytest.raises(ConfigError, match="are those of a data config, which trains nothing; name another"):
        command_for("configs/data/demo.toml", (), ("train", "sft"), "trains nothing")


@pytest.mark.parametrize(
    ("module", "path", "command"),
    [
        ("pretrain.train", "data/demo.toml", "data run"),
        ("posttrain.sft", "posttrain/demo_grpo.toml", "grpo"),
        ("posttrain.dpo", "posttrain/demo_sft.toml", "sft"),
        ("data_pipeline.tokens.train_command", "pretrain/demo.toml", "train"),
        ("export.huggingface", "recipes/demo.toml", "recipe run"),
    ],
)
def test_a_config_of_another_command_is_told_in_one_sentence(module: str, path: str, command: str) -> None:
    file = Path("configs") / path
    with pytest.raises(ConfigError) as told:
        importlib.import_module(module).main([str(file), "--dry-run"])
    assert str(told.value).startswith(f"{file} is a config for `trivium {command}`, by its keys, and not for `trivium ")


def test_misspelt_keys_do_not_make_another_command_s_config() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'trian'; did you mean 'train'\?; unknown key 'modl'"):
        train.main([DEMO, "trian.steps=3", "modl.vocab_size=2", "--dry-run"])
