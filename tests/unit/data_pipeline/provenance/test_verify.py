"""Tests that `trivium data verify` finds and names damage anywhere in a run, and that the remedy it names works."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.loader import ConfigError
from data_pipeline import command
from data_pipeline.provenance import verify
from tests.data_runs import published, write_inputs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the config of a finished run."""
    path = write_inputs(tmp_path_factory.mktemp("verify"))
    assert command.main([str(path), "run.workers=1"]) == 0
    return path


@pytest.fixture(scope="module")
def run_dir(config: Path) -> Path:
    return config.parent / "run"


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file; its size stays the same."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def swap(path: Path) -> None:
    """Swaps a file with another one of its folder and kind."""
    other = next(one for one in sorted(path.parent.glob(f"*{path.suffix}")) if one != path)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def count(path: Path) -> None:
    """Changes a digit of a count in a manifest, whose size and form stay the same."""
    text = path.read_text()
    found = re.search(r'"documents": (\d)', text)
    assert found
    path.write_text(text[: found.start(1)] + str((int(found[1]) + 1) % 10) + text[found.end(1) :])


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of the tokens": ("tokens/train/prose/*.bin", flip),
    "the tokens cut": ("tokens/train/pages/*.bin", cut),
    "shards swapped": ("tokens/train/prose/*.bin", swap),
    "a bit of an index": ("tokens/heldout/prose/*.idx", flip),
    "no sidecar": ("tokens/train/prose/*.parquet", Path.unlink),
    "a count of a store": ("tokens/train/prose/*.json", count),
    "a bit of a text": ("documents/train/pages/*.jsonl.zst", flip),
    "a text cut": ("documents/train/pages/*.jsonl.zst", cut),
    "a bit of a table": ("score/prose/*.parquet", flip),
    "a count of a stage": ("dedup/stage.json", count),
    "no manifest": ("filter/stage.json", Path.unlink),
    "a bit of the plan": ("plan/train.prose.start.npy", flip),
    "a file too many": ("score/prose/*.parquet", lambda path: shutil.copy(path, path.with_name("more.parquet"))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    pattern, damage = DAMAGE[name]
    path = sorted(copy.glob(pattern))[0]
    capsys.readouterr()
    damage(path)
    assert verify.main([str(copy)]) == 1
    said = capsys.readouterr()
    names = path.name if name != "a file too many" else "more.parquet"
    told = [line for line in said.err.splitlines() if line.startswith("damaged: ") and names in line]
    assert told, said.err
    assert str(copy / pattern.split("/")[0]) in told[0]
    if name == "a text cut":
        size = path.stat().st_size
        assert f" has {size:,} bytes and was written with {size + 10:,}; " in told[0]
    assert re.search(rf"{pattern.split('/')[0]} .* damaged", said.out)


def test_a_sound_run_is_sound_by_its_config_too(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(config)]) == 0
    assert f"{run_dir}: everything is as it was written" in capsys.readouterr().out
    assert verify.main([str(run_dir / "plan")]) == 0
    assert re.search(r"token stores .* as written", capsys.readouterr().out)
    for entry in json.loads((run_dir / "score/stage.json").read_text())["files"].values():
        assert len(entry["sha256"]) == 64
    assert not [path for path in run_dir.rglob("*.sha256")]


def test_what_is_no_data_run_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no data run: no folder in it has a stage\.json"):
        verify.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(
        ConfigError, match=r"is a training run; name the run\.dir of `trivium data run`, its config, or"
    ):
        verify.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="does not exist; run: trivium data run"):
        verify.main([str(config), f"run.dir={tmp_path / 'absent'}"])


@pytest.mark.parametrize(("pattern", "damage"), [("tokens/stage.json", count), ("tokens/train/prose/*.bin", flip)])
def test_deleting_the_folder_that_is_named_mends_it(
    pattern: str,
    damage: Callable[[Path], None],
    config: Path,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = published(run_dir)
    damage(sorted(run_dir.glob(pattern))[0])
    capsys.readouterr()
    assert verify.main([str(config)]) == 1
    told = re.search(r"delete the folder (\S+) and run `trivium data run` again", capsys.readouterr().err)
    assert told
    if pattern.endswith("stage.json"):
        assert command.main([str(config), "run.workers=1"]) == 1
        said = capsys.readouterr().err
        assert f"{run_dir}/tokens/stage.json is damaged: its values do not match" in said and told[0] in said
    shutil.rmtree(told[1])
    assert command.main([str(config), "run.workers=1"]) == 0
    assert verify.main([str(config)]) == 0
    assert published(run_dir) == before
