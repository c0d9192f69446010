"""`trivium drill` on the demo's config: what recovers is said to, and so is what does not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.full
# Imported by every Python that starts: a run that goes on leaves out the sample after its checkpoint.
LEAVES_OUT_A_SAMPLE = """
from configs.sealed import CHECKPOINT, Format
right = Format.read
def read(self, content, file):
    tree = right(self, content, file)
    return tree | {"samples": tree["samples"] + 1} if self is CHECKPOINT else tree
Format.read = read
"""


def drilled(folder: Path, *words: str, path: Path | None = None) -> tuple[int, str, dict[str, Any]]:
    """Runs the command; returns its status, what it printed, and drill.json."""
    python = os.pathsep.join(str(one) for one in (path, ROOT) if one)
    done = subprocess.run(
        [sys.executable, "-m", "cli", "drill", "configs/pretrain/demo.toml", "--out", str(folder), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout, json.loads((folder / "drill.json").read_text())


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [((), 2), (("parallel.tp=2",), 2), (("parallel.pp=2",), 2), (("parallel.tp=2", "parallel.pp=2"), 4)],
)
def test_every_layout_recovers_from_every_fault(tmp_path: Path, layout: tuple[str, ...], ranks: int) -> None:
    status, said, record = drilled(tmp_path / "out put", "--nproc-per-node", str(ranks), *layout)
    assert status == 0 and record["passed"], said
    found = {one["name"]: one for one in record["drills"]}
    assert list(found) == ["kill", "stop", "nan", "disk", "torn", "node"]
    assert not any(one["left_out"] for one in found.values())
    assert found["stop"]["statuses"] == [[76], [0]] and found["disk"]["statuses"] == [[1], [0]]
    assert found["disk"]["steps_lost"] > 12 and found["torn"]["steps_lost"] >= 10 and found["kill"]["steps_lost"] < 12
    assert all(one["numbers"] == "the same, bit by bit" and one["seconds"] > 0 for one in found.values())
    assert "drills went as expected" in said and [path.name for path in (tmp_path / "out put").iterdir()] == [
        "drill.json"
    ]


@pytest.mark.parametrize(("action", "lost"), [("skip", 1), ("rewind", 3)])
def test_a_step_that_is_not_finite_is_answered_as_the_config_says(tmp_path: Path, action: str, lost: int) -> None:
    status, said, record = drilled(tmp_path, "--only", "nan", f"spikes.action={action}")
    assert status == 0, said
    (found,) = record["drills"]
    assert found["statuses"] == [[0]] and found["steps_lost"] == lost


def test_a_run_that_goes_on_one_sample_too_late_is_found(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LEAVES_OUT_A_SAMPLE)
    status, said, record = drilled(tmp_path / "out", "--only", "kill", path=tmp_path)
    assert status == 1 and not record["passed"], said
    (found,) = record["drills"]
    assert found["problems"][0].startswith("the numbers are not those of the uninterrupted run: different from step")
    assert "1 of 1 drills did not go as expected: kill" in said and Path(record["runs"], "kill/run").is_dir()
