"""The doctor's lines: what it finds on a machine, in a config and in the folder of a run, and what it says to do."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, load, validate
from configs.train import PretrainConfig, TrainerConfig
from launch.processes import cores
from pretrain.doctor import before_run, doctor
from pretrain.doctor.after_run import after_run
from pretrain.doctor.before_run import checkpoints_kept, disk, trial
from pretrain.doctor.findings import Severity, failure, ok, warning, worst
from pretrain.doctor.machine import machine
from tests.small_training import write_config

DEMO = "configs/pretrain/demo.toml"


def _config(folder: Path, steps: int = 100, **checkpoint: Any) -> TrainerConfig:
    tree: dict[str, Any] = {"run": {"dir": str(folder)}, "optimizer": {"lr": 1e-3}, "checkpoint": checkpoint}
    tree["train"] = {"steps": steps, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 8}
    return validate(TrainerConfig, tree)


def test_a_finding_is_one_line_and_the_gravest_counts() -> None:
    assert str(ok("all is well")) == "ok       all is well"
    assert str(failure("the disk is full", "make room")) == "failure  the disk is full; make room"
    assert worst([ok("a"), failure("b", ""), warning("c", "")]) is Severity.FAILURE and worst([]) is Severity.OK


def test_more_ranks_than_cores_are_told() -> None:
    assert next(str(found) for found in machine(cores()) if "core" in str(found)).startswith("ok ")
    (told,) = [str(found) for found in machine(cores() + 1) if "take turns" in str(found)]
    assert told.endswith(f"; ranks will take turns; start at most {cores()}") and told.startswith("warning")


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [({"every": 10}, 2), ({"every": 10, "keep": 5, "keep_every": 20}, 10), ({"every": 100, "keep": 5}, 1)],
)
def test_checkpoints_on_disk_are_counted(tmp_path: Path, checkpoint: dict[str, int], kept: int) -> None:
    assert checkpoints_kept(_config(tmp_path, **checkpoint)) == kept


def test_a_disk_without_room_for_the_checkpoints_is_a_failure(tmp_path: Path) -> None:
    (found,) = disk(_config(tmp_path / "run" / "here", every=10), parameters=1000)
    assert found.level is Severity.OK and "3 checkpoints of 0.00 GB" in found.found
    assert not (tmp_path / "run").exists() and not list(tmp_path.iterdir()), "looking leaves nothing behind"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    # Two and a half checkpoints fit, so that it does not matter what other programs write or remove meanwhile.
    parameters = free // 12 * 2 // 5
    for more, said in (({}, "set checkpoint.keep=1,"), ({"keep_every": 10}, "keep=1 and checkpoint.keep_every=0,")):
        (found,) = disk(_config(tmp_path, every=10, keep=4, **more), parameters=parameters)
        assert found.level is Severity.FAILURE and said in found.remedy
    (found,) = disk(_config(tmp_path, every=10, keep=1, keep_every=0), parameters=parameters)
    assert found.level is not Severity.FAILURE
    (found,) = disk(_config(tmp_path, every=10), parameters=10**15)
    assert found.level is Severity.FAILURE and found.remedy.startswith("not even two fit")


def test_a_disk_for_local_checkpoints_is_looked_at(tmp_path: Path) -> None:
    local = Path("/dev/shm" if tmp_path.stat().st_dev != Path("/dev/shm").stat().st_dev else "/run")
    options: dict[str, Any] = {"every": 10, "local_dir": str(local / tmp_path.name), "local_every": 5}
    config = _config(tmp_path, **options)
    assert list(disk(config, parameters=1000))[-1].level is Severity.OK
    last = list(disk(config, parameters=shutil.disk_usage(local).free // 20))[-1]
    assert last.level is Severity.WARNING and "local checkpoints are given up on fewer than 3 nodes" in last.remedy
    same = _config(tmp_path, **{**options, "local_dir": str(tmp_path / "local")})
    assert "it is on the same file system as run.dir" in list(disk(same, parameters=1000))[-1].found
    (tmp_path / "file").write_text("")
    wrong = _config(tmp_path, **{**options, "local_dir": str(tmp_path / "file")})
    assert list(disk(wrong, parameters=1000))[-1].level is Severity.FAILURE


def test_a_disk_with_no_room_at_all_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (found,) = disk(_config(tmp_path, every=10), parameters=10)
    assert found.level is Severity.FAILURE and "3.0 MB free, too little to measure its speed" in found.found


def test_a_slow_disk_is_told_and_a_faster_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path) -> tuple[float, float]:
        return 1.0 if folder.name == "fast" else 2e9, 0.0  # seconds for the file that measures, seconds of the clock

    monkeypatch.setattr(before_run, "_write", write)
    for name, level in (("slow", Severity.WARNING), ("fast", Severity.OK)):
        (tmp_path / name).mkdir()
        (found,) = disk(_config(tmp_path / name, every=10), parameters=1000)
        assert found.level is level
        assert found.remedy.endswith(" to write; name a run.dir on a faster disk") or level is Severity.OK


def test_a_run_dir_that_cannot_be_used_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = disk(_config(tmp_path / "file"), None)
    assert (
        found.level is Severity.FAILURE
        and found.found.endswith("is a file")
        and found.remedy.startswith("name a folder")
    )


def test_what_the_command_would_refuse_is_a_failure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Asks the real command, as one of three ranks: it names the first thing that is wrong."""

    def failures(*words: str) -> list[str]:
        assert doctor.main([*words, f"run.dir={tmp_path / 'run'}"]) == 1
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("failure ")]

    (layout,) = failures("--ranks", "3", "train", DEMO, "parallel.tp=2", "data.plan=no/plan")
    assert "does not divide the 3 ranks started; the number of ranks could be 2 or 4" in layout
    tmp_path.joinpath("run").write_text("")  # what is wrong with the disk is told as well
    plan, folder = failures(DEMO, "parallel.tp=2", "data.plan=no/plan")  # on two ranks, which it needs
    assert "no/plan" in plan and "trivium data run" in plan
    assert "run.dir" in folder and "is a file" in folder


@pytest.mark.parametrize("words", [["train"], ["sample", "CONFIG"], ["no/folder"], ["--ranks", "0"]])
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        doctor.main(words)


def test_a_run_without_a_checkpoint_would_begin_again(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[train]\nsteps = 9\n")
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "skipped": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [str(finding) for finding in after_run(tmp_path)]
    assert found[0] == "warning  there is no checkpoint; the run would begin again at step 0"
    assert "1 steps were skipped, the last at step 2" in found[1]
    assert "it ended at step 2 of 9" in found[-1]


@pytest.mark.full
def test_a_trial_leaves_the_runs_mirror_and_disks_alone(tmp_path: Path) -> None:
    words = [str(write_config(tmp_path, 10, tmp_path / "run", rows=60)), f"checkpoint.mirror={tmp_path / 'mirror'}"]
    words += [f"checkpoint.local_dir={tmp_path / 'local'}", "checkpoint.local_every=1"]
    found = trial("train", words, 1, load(PretrainConfig, words[0], words[1:]))
    assert found.level is Severity.OK, found
    assert not any((tmp_path / name).exists() for name in ("run", "mirror", "local"))


def test_a_data_run_is_no_training_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[run]\ndir = "x"\n')
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"`trivium data verify {tmp_path}` compares its files with their checksums"):
        doctor.main([str(tmp_path)])
