"""Faults of `trivium drill` on two ranks that only count: real launchers, signals and files, but no training."""

from pathlib import Path

import pytest

from configs.layout import Layout
from configs.loader import load
from configs.train import PretrainConfig
from launch.processes import ProcessGroup
from pretrain.drill.drilled_run import DrilledRun
from pretrain.drill.faults import DRILLS, Setting
from pretrain.drill.small_config import EVERY, STEPS
from pretrain.drill.verdicts import SAME, DrillOutcome, Numbers

ROOT = Path(__file__).resolve().parents[4]
# The loss of rank 0 depends on all numbers before. LATE is added to what a checkpoint is taken up with.
COUNTING = """
import hashlib, json, os, sys, time
from pathlib import Path
run = Path(next(word for word in sys.argv if word.startswith("run.dir="))[8:])
run.mkdir(exist_ok=True, parents=True)
rank, log, step, state, lines = int(os.environ["RANK"]), run / "metrics.jsonl", 0, 0, []
start = os.environ["MASTER_PORT"]
(run / f"rank_{rank}_{start}").write_text(str(os.getpid()))
while rank == 1:
    time.sleep(0.02)
    if (run / "over").exists():
        sys.exit(0)
for folder in sorted(run.glob("checkpoints/step_*"), key=lambda path: -int(path.name[5:])):
    found, file = json.loads((folder / "manifest.json").read_text()), folder / "rank_00000.safetensors"
    if hashlib.sha256(file.read_bytes()).hexdigest() != found["sha256"]:
        print(f"warning: {file} is damaged", flush=True)
        continue
    step, state, lines = found["step"], found["state"] + LATE, log.read_text().splitlines()[: found["step"]]
    print(f"train: going on from {folder}", flush=True)
    break
log.with_suffix(".new").write_text("".join(f"{line}\\n" for line in lines))
log.with_suffix(".new").rename(log)
while not (other := run / f"rank_1_{start}").exists() or not other.read_text():
    time.sleep(0.02)
while step < STEPS:
    if Path(f"/proc/{other.read_text()}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
        sys.exit(1)
    step, state = step + 1, state * 31 % 1009 + step
    with log.open("a") as file:
        file.write(json.dumps({"step": step, "loss": state}) + "\\n")
    if step % EVERY == 0:
        folder, content = run / f"checkpoints/step_{step}", state.to_bytes(4, "big") * 5000
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rank_00000.safetensors").write_bytes(content)
        facts = {"step": step, "state": state, "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(facts))
    time.sleep(0.05)
(run / "over").touch()
"""


def drilled(folder: Path, name: str, late: int = 0) -> DrillOutcome:
    """Does one drill with ranks that only count; with `late` they go on from a wrong number after a fault."""
    config = load(PretrainConfig, ROOT / "configs/pretrain/demo.toml")
    layout = Layout.of(2, config.parallel, config.model, config.train)
    numbers = f"STEPS, EVERY, LATE = {STEPS}, {EVERY}, {late}\n"
    (folder / "counting.py").write_text(numbers + COUNTING)
    outcome = DrillOutcome(name)
    with ProcessGroup() as group:
        runs = [DrilledRun(folder / "config.toml", folder / one, 2, group, lambda _: None) for one in ("still", name)]
        for run in runs:
            run.command = "counting"
        runs[0].start()
        assert runs[0].wait() == [0], runs[0].output
        setting = Setting(config, layout, Numbers.of_run(runs[0].run_dir, STEPS))
        DRILLS[name].do(setting, runs[1], outcome)
    return outcome


@pytest.fixture(autouse=True)
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")


def test_a_killed_rank_and_numbers_that_are_wrong_after_it_are_found(tmp_path: Path) -> None:
    outcome = drilled(tmp_path, "kill", late=1)
    assert [statuses[-1] for statuses in outcome.statuses] == [137, 0]
    assert outcome.fault.startswith("SIGKILL of rank 1 after step ")
    assert outcome.said == "rank 1 was killed by signal 9"
    (problem,) = outcome.problems
    assert problem.startswith("the numbers are not those of the uninterrupted run: different from step ")


@pytest.mark.full
@pytest.mark.parametrize("name", ["torn", "node"])
def test_damaged_checkpoints_and_a_lost_node(tmp_path: Path, name: str) -> None:
    outcome = drilled(tmp_path, name)
    assert outcome.passed and outcome.numbers == SAME, outcome.problems
    assert outcome.seconds is not None and outcome.steps_lost is not None
    if name == "torn":
        assert outcome.steps_lost >= 10 and "step_12/rank_00000.safetensors is damaged" in outcome.said
    else:
        assert outcome.statuses[0][1] == 137 and len(outcome.statuses[1]) == 2
