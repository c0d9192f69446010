"""The demo's presets have the same losses in every layout: 20 steps on the real corpus in fp32, by `trivium launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
LAYOUTS = {"one": (1, ()), "tp2": (2, ("parallel.tp=2",)), "pp2": (2, ("parallel.pp=2",))}
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the repository's configs and data, and the demo's plan in runs/demo/data."""
    folder = tmp_path_factory.mktemp("losses")
    for name in ("configs", "data"):
        (folder / name).symlink_to(ROOT / name)
    run(folder, "data_pipeline.command", "configs/data/demo.toml")
    return folder


def run(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def losses(folder: Path, preset: str, layout: str) -> list[float]:
    world, overrides = LAYOUTS[layout]
    run_dir = folder / "runs" / f"{preset}_{layout}"
    settings = (f"run.dir={run_dir}", f"train.steps={STEPS}", "train.precision=fp32", "eval.rows=0", *overrides)
    launcher = ("launch.ranks", "--nproc-per-node", str(world))
    run(folder, *launcher, "pretrain.train", f"configs/pretrain/{preset}.toml", *settings)
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", ["demo", "demo_moe"])
def test_losses_agree_after_twenty_steps(folder: Path, preset: str) -> None:
    found = {layout: losses(folder, preset, layout) for layout in LAYOUTS}
    assert [len(values) for values in found.values()] == [STEPS] * len(found)
    assert found["one"][-1] < found["one"][0] - 1
    for values in found.values():
        assert values == pytest.approx(found["one"], abs=1e-4)
