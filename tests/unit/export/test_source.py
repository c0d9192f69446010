"""What an export is told, and what a run directory says of itself."""

import json
from pathlib import Path

import pytest
import torch

from configs.export import ExportConfig
from configs.loader import ConfigError, load, plain, toml
from configs.sealed import CHECKPOINT
from export.source import open_source
from posttrain.chat import jinja_template
from pretrain.checkpoint import storage
from tests.unit.export.conftest import random_weights, tiny

ROOT = Path(__file__).resolve().parents[3]


def make_run(folder: Path, config: dict, steps: list[int]) -> Path:
    """A run directory with checkpoints of `tiny()`, written as a trainer of one rank writes them."""
    config = config | {"model": plain(tiny()), "train": {"seq_length": 96}}
    for step in steps:
        pieces = {}
        for name, tensor in random_weights(tiny(), seed=step).items():
            shape = tuple(tensor.shape)
            piece = storage.Piece(name, shape, (0,) * len(shape), shape, 0, tensor.numel())
            pieces[name] = (piece, {kind: tensor.flatten().clone() for kind in storage.KINDS})
        final = storage.directory(folder, step)
        temporary = final.with_name(f".{final.name}")
        temporary.mkdir(parents=True)
        part = storage.write_rank(temporary, 0, pieces)
        storage.publish(temporary, final, [part], {"step": step, "config": config})
    (folder / "config.toml").write_bytes(toml(config))
    return folder


def test_the_preset_is_valid():
    config = load(ExportConfig, ROOT / "configs/export/demo.toml", ["run=runs/other", "step=40"])
    assert (config.run, config.step, config.verify.tolerance, config.verify.greedy_tokens) == (
        "runs/other",
        40,
        1e-4,
        64,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=-1", "-1 is no step"),
        ("step=newest", "'newest' is no step"),
        ("dtype=float16", "dtype = 'float16'"),
        ("verify.rows=0", r"verify\.rows = 0"),
        ("verfy.rows=1", "did you mean 'verify'"),
        ("chat_prompts=[]", r"chat_prompts = \[\]"),
    ],
)
def test_wrong_keys_and_values_are_told(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(ExportConfig, ROOT / "configs/export/demo.toml", [override])


def test_latest_step_checkpoint_and_tokenizer(tmp_path: Path, tokenizer_path: Path):
    run = make_run(tmp_path / "run", {"data": {"tokenizer": str(tokenizer_path)}}, [2, 10])
    assert open_source(run).step == 10
    two = open_source(run, 2)
    assert (two.step, two.model, two.seq_length, two.tokenizer) == (2, tiny(), 96, tokenizer_path)
    assert open_source(run / "checkpoints/step_2").identity == two.identity != open_source(run).identity
    expected = random_weights(tiny(), seed=2)
    weights = two.read()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"step = 3 has no checkpoint.*saved steps are \[2, 10\]"):
        open_source(run, 3)


def test_a_run_inherits_the_plan_of_the_run_it_began_from(tmp_path: Path, tokenizer_path: Path):
    base = make_run(tmp_path / "base", {"data": {"plan": "runs/demo/data/plan"}}, [1])
    init = {"run": str(base), "tokenizer": str(tokenizer_path.parent)}
    sft = make_run(tmp_path / "sft", {"init": init, "data": {}}, [1])
    grpo = make_run(tmp_path / "grpo", {"init": init | {"run": str(sft)}}, [1])
    with pytest.raises(ConfigError, match=r"sft was trained on dialogues and has no chat_template\.jinja"):
        open_source(sft)
    for run in (sft, grpo):
        (run / "chat_template.jinja").write_text(jinja_template())
        source = open_source(run)
        assert (source.plan, source.tokenizer) == (Path("runs/demo/data/plan"), tokenizer_path)
        assert source.chat_template == jinja_template()
    (base / "config.toml").unlink()
    assert open_source(grpo).plan is None


def test_what_is_no_run_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_source(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no checkpoints folder"):
        open_source(tmp_path)
    run = make_run(tmp_path / "run", {"data": {"plan": str(tmp_path / "gone")}}, [1])
    with pytest.raises(ConfigError, match=r"data\.plan = .*gone does not exist"):
        open_source(run)
    manifest = run / "checkpoints/step_1/manifest.json"
    raw = json.loads(manifest.read_text())
    del raw["config"]["model"]
    manifest.write_bytes(CHECKPOINT.write(raw))
    with pytest.raises(ConfigError, match=r"have a \[model\] section"):
        open_source(run)
