"""Mistakes in a config are reported by a sentence that names the key, the value and what to change."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from configs import files, loader
from configs.data import DataConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.rl import GRPOConfig
from configs.train import Precision, PretrainConfig

_KEY = re.compile(r"as in (\S+)=VALUE")
PRESETS = Path(__file__).resolve().parents[3] / "configs"
DEMO = PRESETS / "pretrain" / "demo.toml"


@pytest.mark.parametrize("name", ["demo.toml", "demo_moe.toml"])
def test_pretraining_presets_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = loader.load(PretrainConfig, PRESETS / "pretrain" / name)
    loader.write(config, tmp_path / "config.toml")
    assert loader.load(PretrainConfig, tmp_path / "config.toml") == config
    assert (config.model.moe is not None) == (name == "demo_moe.toml")


def test_overrides_are_toml_values_or_bare_words() -> None:
    config = loader.load(
        PretrainConfig, DEMO, ["train.steps=70", "train.precision=bf16", "optimizer.betas=[0.8, 0.9]", "run.dir=a/b=c"]
    )
    assert (config.train.steps, config.train.precision) == (70, Precision.BF16)
    assert (config.optimizer.betas, config.run.dir) == ((0.8, 0.9), "a/b=c")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", ["unknown key 'train.stpes'", "did you mean 'steps'"]),
        ("model.moe.num_expert=3", ["unknown key 'model.moe.num_expert'", "did you mean 'num_experts'"]),
        ("nonsense=1", ["unknown key 'nonsense'", "known keys here: run"]),
        ("train.steps=many", ["train.steps = 'many'", "valid integer"]),
        ("train.steps=2.5", ["train.steps = 2.5", "valid integer"]),
        ("parallel.tp=true", ["parallel.tp = True", "valid integer"]),
        ("parallel.zero=0", ["parallel.zero = 0", "1, 2 or 3"]),
        ("train.steps=0", ["train.steps = 0", "greater than or equal to 1"]),
        ("train.precision=fp8", ["train.precision = 'fp8'", "'fp32', 'bf16' or 'auto'"]),
        ("model.num_kv_heads=5", ["model.num_heads", "not a multiple of model.num_kv_heads = 5"]),
        ("schedule.warmup_steps=100000", ["warmup_steps = 100000", "set train.steps=100000 or more"]),
        ("train.steps", ["not of the form key.sub=value"]),
        ("train=5", ["train = 5: this is a section", "its keys (steps, global_batch_size"]),
        ("optimizer.betas=0.9", ["optimizer.betas = 0.9", "a list is written like [1, 2]"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas has too few values"]),
        ("train.compile=1", ["train.compile = 1", "write true or false"]),
        ("run.dir=3", ["run.dir = 3", "text is written in quotes"]),
        ("trian.steps=5", ["unknown key 'trian'", "did you mean 'train'"]),
        ("train.steps.x=1", ["'steps' is a value, not a section"]),
    ],
)
def test_a_mistake_names_key_value_and_remedy(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        loader.load(PretrainConfig, DEMO, [override])
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


def test_a_typo_in_a_section_of_the_users_naming_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'rules\.english\.word_coutn'; did you mean 'word_count'"):
        loader.load(DataConfig, PRESETS / "data" / "demo.toml", ["rules.english.word_coutn={ min = 3 }"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sources.english.files=[]", "sources.english.files = [] has 0 values; give it 1 or more"),
        ("sources.english.rules={}", "sources.english.rules = {} has 0 values; give it 1 or more"),
        (
            "run.slurm.time='a day'",
            'run.slurm.time: \'a day\' is no time limit of sbatch; write hours as "24:00:00" or days as "2-12:00:00"',
        ),
    ],
)
def test_mistakes_in_a_data_config_are_plain_sentences(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loader.load(DataConfig, PRESETS / "data" / "demo.toml", [override])
    assert str(raised.value).partition(": ")[2] == sentence
    for limit in ("24:00:00", "2-12:00:00"):
        assert loader.load(DataConfig, PRESETS / "data" / "demo.toml", [f"run.slurm.time='{limit}'"])


def test_a_missing_file_and_broken_toml_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml does not exist; presets are under configs/"):
        loader.load(PretrainConfig, tmp_path / "no.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        loader.load(PretrainConfig, tmp_path / "broken.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match=r"section 'run' is missing; .*; section 'optimizer' is missing;") as said:
        loader.load(PretrainConfig, tmp_path / "empty.toml")
    model = [f"model.{key}=8" for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads")]
    train = ["train.global_batch_size=1", "train.micro_batch_size=1", "train.seq_length=8", "model.head_dim=2", *model]
    named = [
        f"{key}=8" if "dir" not in key and "plan" not in key else f"{key}=a" for key in _KEY.findall(str(said.value))
    ]
    assert {one.partition(".")[0] for one in named} == {"run", "train", "optimizer", "model", "data"}
    loader.load(PretrainConfig, tmp_path / "empty.toml", [*named, *train])
    with pytest.raises(ConfigError, match=r"names below it, as in sources\.NAME\.files=VALUE"):
        loader.load(DataConfig, tmp_path / "empty.toml")


def test_none_is_left_out_of_the_resolved_copy() -> None:
    text = loader.toml({"a": {"b": None, "c": 1}, "d": None}).decode()
    assert tomllib.loads(text) == {"a": {"c": 1}}


def test_a_pipe_and_an_open_file_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, opened, link = tmp_path / "pipe", tmp_path / "open", tmp_path / "stdout"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomic(pipe, b"through")
    assert os.read(reading, 99) == b"through" and pipe.is_fifo()
    os.close(reading)
    with opened.open("wb") as file:
        link.symlink_to(f"/proc/self/fd/{file.fileno()}")  # as /dev/stdout is
        files.write_atomic(link, b"through")
        assert link.is_symlink() and opened.read_bytes() == b"through"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["parallel.tp=3"],
            "parallel.tp * parallel.cp * parallel.pp = 3 * 1 * 1 = 3 does not divide the 1 ranks started",
        ),
        (["train.stepz=3"], "did you mean 'steps'"),
        (["data.plan=nowhere"], "nowhere"),
    ],
)
def test_training_refuses_a_bad_config_with_status_2(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "pretrain.train", str(DEMO), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PRESETS.parent)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_a_config_may_begin_with_a_byte_order_mark_and_must_be_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbf" + DEMO.read_bytes())
    assert loader.load(PretrainConfig, file) == loader.load(PretrainConfig, DEMO)
    file.write_bytes(DEMO.read_text(encoding="utf-8").encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a\.toml is not UTF-8 at byte 0; save it in UTF-8"):
        loader.load(PretrainConfig, file)


def test_a_name_that_is_not_utf_8_is_told_with_its_key() -> None:
    for override, key in (
        ("run.dir=runs/caf\udce9", r"run\.dir"),
        ("sources.english.files=['a', '\udcff']", r"files\[1\]"),
    ):
        with pytest.raises(ConfigError, match=rf"demo\.toml: \S*{key} = '\S+' is not valid UTF-8; rename the file"):
            loader.load(DataConfig, PRESETS / "data/demo.toml", [override])


@pytest.mark.parametrize(
    ("schema", "file", "overrides", "key"),
    [
        (PretrainConfig, "pretrain/demo.toml", ["model=mixtral-8x7b", "model.moe=none"], "model.moe"),
        (PretrainConfig, "pretrain/demo_moe.toml", ["model.moe=none"], "model.moe"),
        (PretrainConfig, "pretrain/demo.toml", ["model=qwen3-0.6b", "model.head_dim=none"], "model.head_dim"),
        (DataConfig, "data/demo.toml", ["lines=none"], "lines"),
        (DataConfig, "data/demo.toml", ["canaries.mail=none"], "canaries.mail"),
        (GRPOConfig, "posttrain/demo_grpo.toml", ["adapter.kind=lora", "adapter=none"], "adapter"),
    ],
)  # fmt: skip
def test_none_leaves_out_what_a_file_or_a_published_model_has(
    schema: type[BaseModel], file: str, overrides: list[str], key: str
) -> None:
    *sections, last = key.split(".")
    before = loader.plain(loader.load(schema, PRESETS / file, overrides[:-1]))
    after = loader.plain(loader.load(schema, PRESETS / file, overrides))
    for section in sections:
        before, after = before[section], after[section]
    assert last not in after and last in before


def test_none_stays_where_it_is_a_value_and_is_refused_where_a_key_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(DEMO.read_text().replace("[model]", '[model]\nmoe = "none"'))
    assert loader.load(PretrainConfig, tmp_path / "a.toml").model.moe is None
    overrides = ["model.position.kind=none", "train.recompute=none", "init.run=none"]
    config = loader.load(PretrainConfig, DEMO, overrides)
    assert (config.model.position.kind, config.train.recompute, config.init and config.init.run) == ("none",) * 3
    with pytest.raises(ConfigError, match=r"train = 'none': this is a section, .* as in train\.steps=VALUE$"):
        loader.load(PretrainConfig, DEMO, ["train=none"])
    with pytest.raises(ConfigError, match=r"or leave it out by model\.moe=none$"):
        loader.load(PretrainConfig, DEMO, ["model.moe=dense"])


@pytest.mark.parametrize("numbers", [1, 2, 4])
def test_longrope_has_a_number_for_each_frequency(numbers: int) -> None:
    """Gives a number too few or too many: one would fit any head by broadcasting, and two would widen the angles."""
    scaling = {"kind": "longrope", "original_length": 16, "short_factor": [1.0] * 3, "long_factor": [1.0] * numbers}
    sizes = {"vocab_size": 32, "num_layers": 1, "hidden_size": 12, "ffn_hidden_size": 8, "num_heads": 2}
    model = {**sizes, "num_kv_heads": 2, "position": {"scaling": scaling}}
    with pytest.raises(ConfigError, match=rf"long_factor has {numbers} numbers, and longrope .* give it 3 numbers"):
        validate(ModelConfig, model)
    scaling["long_factor"] = [1.0] * 3
    validate(ModelConfig, model)
