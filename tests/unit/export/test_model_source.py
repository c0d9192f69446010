"""Opening models: from a run directory, a checkpoint or an imported folder, and what is refused."""

import re
from pathlib import Path

import pytest
import torch

from configs.export import ExportConfig
from configs.loader import ConfigError, Failure, load, plain
from export.model_source import open_source
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Lineage
from tests.tiny_models import random_weights, tiny

ROOT = Path(__file__).resolve().parents[3]


def make_run(folder: Path, tokenizer: Path, steps: list[int]) -> Path:
    """Makes a run directory with checkpoints of `tiny()`, in the form that a trainer on one rank writes."""
    lineage = Lineage(tokenizer)
    facts = {"config": {"model": plain(tiny())}, "context": 96, "identity": lineage.identity, **lineage.facts}
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
        storage.publish(temporary, final, [part], {"step": step, **facts})
    lineage.keep(folder, lineage.identity)
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
        ("step=-1", "-1 is not a step"),
        ("step=newest", "'newest' is not a step"),
        ("dtype=float64", "dtype = 'float64'"),
        ("verify.rows=0", r"verify\.rows = 0"),
        ("verfy.rows=1", "did you mean 'verify'"),
        ("chat_prompts=[]", r"chat_prompts = \[\]"),
    ],
)
def test_wrong_keys_and_values_are_told(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(ExportConfig, ROOT / "configs/export/demo.toml", [override])


def test_latest_step_checkpoint_and_tokenizer(tmp_path: Path, tokenizer_path: Path):
    run = make_run(tmp_path / "run", tokenizer_path, [2, 10])
    assert open_source(run).step == 10
    two = open_source(run, 2)
    assert (two.step, two.model, two.context, two.tokenizer) == (2, tiny(), 96, run / "tokenizer.model")
    assert open_source(run / "checkpoints/step_2").identify() == two.identify() != open_source(run).identify()
    expected = random_weights(tiny(), seed=2)
    weights = two.read()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"step = 3 has no checkpoint.*saved steps are \[2, 10\]"):
        open_source(run, 3)


def test_an_older_checkpoint_than_the_newest_is_taken_with_a_warning(tmp_path: Path, tokenizer_path: Path, capsys):
    run = make_run(tmp_path / "run", tokenizer_path, [2, 10])
    (file,) = (run / "checkpoints/step_10").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert open_source(run).step == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: .*step_10/.* does not match its SHA-256.*: .*/checkpoints/step_2 is taken\n", said)
    open_source(run, 2)
    assert capsys.readouterr().err == ""
    file = next((run / "checkpoints/step_2").glob("*.safetensors"))
    file.unlink()
    with pytest.raises(Failure, match=r"no checkpoint of .*/run is whole: .*step_2/.* is missing.*; restore one, or"):
        open_source(run)


def test_what_is_no_run_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_source(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no checkpoints folder"):
        open_source(tmp_path)
