"""Commands that get a signal at any moment end at once, with the right status and no traceback or process left."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import storage
from tests.e2e.started_commands import CLI, HELD_BACK, ROOT, TORCHRUN, TRAINING, Command, wait_for_step
from tests.small_training import last_step, write_config

STATUS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_config(folder, 20_000, folder / "run", rows=80_000)


def test_a_signal_while_ranks_start_is_answered_by_all(tmp_path: Path) -> None:
    """Sends the signal while ranks import, or before; there is no plan, so that they end soon in any case."""
    for number, delay in ((signal.SIGTERM, 0.05), (signal.SIGUSR1, 0.9)):
        run = tmp_path / "run"
        command = Command(tmp_path, [*HELD_BACK, *TRAINING["launch"], "configs/pretrain/demo.toml", f"run.dir={run}"])
        while not begun(command, "launch", number, held_back=True):
            time.sleep(0.001)
        time.sleep(delay)
        if command.process.poll() is not None:  # it has found the missing plan already
            continue
        status = command.stop(number)
        assert status in (75, 2) and "Traceback" not in command.said(), (status, command.said())
        assert command.survivors() == []


@pytest.mark.full
@pytest.mark.parametrize("held_back", [True, False])
@pytest.mark.parametrize("way", ["alone", "launch", "mpirun"])
@pytest.mark.parametrize("number", STATUS)
def test_any_moment_of_the_start(
    config: Path, tmp_path: Path, way: str, number: signal.Signals, held_back: bool
) -> None:
    """Sends signals at every moment: one that is not blocked may kill a process that has nothing to lose yet.

    mpirun itself forgets a signal of its first moments, so a script would repeat it; here it gets none
    before both ranks are there.
    """
    run = tmp_path / "run"
    before, after = (HELD_BACK, ()) if way != "mpirun" else ((), HELD_BACK)
    launcher, command = (TRAINING[way][:3], TRAINING[way][3:]) if way == "mpirun" else ((), TRAINING[way])
    argv = [*(before if held_back else ()), *launcher, *(after if held_back else ()), *command]
    for milliseconds in (0, 20, 50, 100, 200, 400):
        started = Command(tmp_path, [*argv, str(config), f"run.dir={run}", "train.steps=2"])
        deadline = time.monotonic() + 60
        while not begun(started, way, number, held_back):
            assert time.monotonic() < deadline and started.process.poll() is None, started.said()
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        status = started.stop(number)
        allowed = {STATUS[number]}
        if not held_back:
            allowed |= {-number, 128 + number}
            # mpirun joins the bits of its ranks' statuses, of which a signal's is its number, and kills those left.
            allowed |= {number | more for more in (0, signal.SIGKILL, STATUS[number])} if way == "mpirun" else set()
        too_early = not held_back and "Fatal Python error: init_" in started.said()  # Python's own start has no handler
        assert status in allowed or too_early, (milliseconds, status, started.said())
        assert "Traceback" not in started.said() or not held_back, (milliseconds, started.said())
        assert started.survivors() == [] and not storage.steps(run), milliseconds
    assert (
        subprocess.run([*TRAINING["alone"], str(config), f"run.dir={run}", "train.steps=2"], cwd=ROOT).returncode == 0
    )


def begun(command: Command, way: str, number: signal.Signals, held_back: bool) -> bool:
    """Tells whether the processes that get a signal are there, each safe from it if it is held back."""
    pids = command.ranks() if way == "mpirun" else [command.process.pid]
    return len(pids) == (2 if way == "mpirun" else 1) and all(answers(pid, number, held_back) for pid in pids)


def answers(pid: int, number: signal.Signals, held_back: bool) -> bool:
    """Tells whether a process blocks a signal or has its handler, or, if it is not held back, does not ignore it.

    One that a shell began in the background ignores Ctrl-C at first, and so do the tests' own processes there.
    """
    lines = (line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    masks = {key: int(value, 16) >> number - 1 & 1 for key, value in lines if key in ("SigBlk", "SigIgn", "SigCgt")}
    return bool(masks["SigBlk"] or masks["SigCgt"]) if held_back else not masks["SigIgn"]


@pytest.mark.full
@pytest.mark.parametrize("way", TRAINING)
@pytest.mark.parametrize(
    ("number", "delay"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGUSR1, 3.5), (signal.SIGINT, 5), (signal.SIGTERM, 7)],
)
def test_before_the_first_step(config: Path, tmp_path: Path, way: str, number: signal.Signals, delay: float) -> None:
    run = tmp_path / "run"
    command = Command(tmp_path, [*TRAINING[way], str(config), f"run.dir={run}"])
    time.sleep(delay)
    status = command.stop(number)
    assert status == STATUS[number], command.said()
    assert "Traceback" not in command.said() and command.survivors() == []
    assert last_step(run) == (storage.steps(run) or [0])[-1], "what was trained is saved"


@pytest.mark.full
@pytest.mark.parametrize("way", TRAINING)
@pytest.mark.parametrize("number", STATUS)
def test_in_the_middle_and_twice(config: Path, tmp_path: Path, way: str, number: signal.Signals) -> None:
    run = tmp_path / "run"
    command = Command(tmp_path, [*TRAINING[way], str(config), f"run.dir={run}"])
    wait_for_step(command, run, 3)
    if (way, number) != ("mpirun", signal.SIGINT):  # a second Ctrl-C makes mpirun abort, as it says
        command.process.send_signal(number)
        time.sleep(0.05)
    status = command.stop(number)
    assert status == STATUS[number], command.said()
    assert "Traceback" not in command.said() and command.survivors() == []
    assert storage.verify(storage.latest(run))["step"] == last_step(run) >= 3


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM])
def test_ranks_of_a_torchrun_that_is_gone_save_and_end(config: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Starts the next torchrun at once: it waits for the ranks of the first and goes on."""
    run = tmp_path / "run"
    argv = [*TORCHRUN, str(config), f"run.dir={run}"]
    command = Command(tmp_path, argv)
    wait_for_step(command, run, 3)
    assert command.stop(number) in (-signal.SIGKILL, -signal.SIGUSR1, 1)
    again = Command(tmp_path, argv)
    wait_for_step(again, run, last_step(run) + 3)
    assert "another process is training" not in again.said()
    again.stop(signal.SIGTERM)
    assert again.survivors() == []
    assert storage.verify(storage.latest(run))["step"] == last_step(run)


@pytest.mark.full
def test_ctrl_c_ends_every_other_command(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert subprocess.run([*CLI, "train", str(config), f"run.dir={run}", "train.steps=3"], cwd=ROOT).returncode == 0
    commands = {
        "data run": ["configs/data/demo.toml", f"run.dir={tmp_path / 'data'}", "run.workers=2"],
        "export": [
            *("configs/export/demo.toml", f"run={run}", f"out={tmp_path / 'export'}"),
            *("verify.greedy_tokens=9", "sample_tokens=9"),
        ],
        "generate": [str(run), "--prompt", "It", "--max-new-tokens", "100000"],
        "chat": [str(run)],
        "prove": ["configs/pretrain/demo.toml", "--layouts", "tp2", "--out", str(tmp_path / "prove")],
    }
    for name, arguments in commands.items():
        for delay in (1.5, 4, 8) if name != "chat" else (1.5,):  # later, `chat` has refused the run
            command = Command(tmp_path, [*CLI, *name.split(), *arguments])
            time.sleep(delay)
            if command.process.poll() is not None:
                continue
            status = command.stop(signal.SIGINT, seconds=20)
            assert status == 130 or (status == 0 and "interrupted" not in command.said()), (name, command.said())
            assert "Traceback" not in command.said(), (name, command.said())
            assert command.survivors(5) == [], name
