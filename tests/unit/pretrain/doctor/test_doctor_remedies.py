"""Remedies of the doctor: each fault is made, the words are read, and once they are followed it finds all well."""

import fcntl
import json
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.loader import validate
from configs.sealed import CHECKPOINT
from configs.train import PretrainConfig
from pretrain.checkpoint import storage
from pretrain.doctor import before_run
from pretrain.doctor import machine as machine_checks
from pretrain.doctor.after_run import after_run
from pretrain.doctor.findings import Finding, Severity
from pretrain.doctor.machine import PYTHONS, machine
from pretrain.logs.goodput import FILE
from pretrain.logs.metrics import MetricsLog
from pretrain.run.run_directory import RunDirectory
from tests.training_configs import BASES

GIB = 2**30


def config(folder: Path, **checkpoint: Any) -> PretrainConfig:
    return validate(PretrainConfig, BASES["pretrain"] | {"run": {"dir": str(folder)}, "checkpoint": checkpoint})


def write_run(folder: Path, saved: int, logged: int) -> None:
    """Writes what is left of a run of 9 steps: a whole checkpoint without weights, and a log."""
    checkpoint = storage.directory(folder, saved)
    checkpoint.mkdir(parents=True)
    facts = {"step": saved, "files": {}, "config": {"train": {"steps": 9}}}
    (checkpoint / storage.MANIFEST).write_bytes(CHECKPOINT.write(facts))
    (folder / "config.toml").write_text("[train]\nsteps = 9\n")
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, logged + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def said(findings: Iterator[Finding]) -> dict[str, Severity]:
    return {str(finding)[9:]: finding.level for finding in findings}


def test_steps_after_the_last_checkpoint_are_done_again(tmp_path: Path) -> None:
    write_run(tmp_path, saved=2, logged=5)
    newest = storage.directory(tmp_path, 2)
    assert said(after_run(tmp_path))[f"{newest} is whole; 3 steps after it are done again"] is Severity.WARNING
    MetricsLog(tmp_path, 2, tensorboard=False).close()  # as the run does when it goes on from there
    assert said(after_run(tmp_path))[f"{newest} is whole"] is Severity.OK


def test_a_broken_line_of_the_log_is_set_aside_when_the_run_goes_on(tmp_path: Path) -> None:
    write_run(tmp_path, saved=2, logged=2)
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write("{broken}\n")
    words = (
        "line 3 of metrics.jsonl is no JSON object with a step and left out; broken lines are set aside when the run "
        "goes on"
    )
    assert said(after_run(tmp_path))[words] is Severity.WARNING
    MetricsLog(tmp_path, 2, tensorboard=False).close()
    assert words not in said(after_run(tmp_path))


def test_a_damaged_config_is_written_again_when_the_run_goes_on(tmp_path: Path) -> None:
    write_run(tmp_path, saved=2, logged=2)
    own, facts = config(tmp_path), SimpleNamespace(as_dict=dict)
    source: Any = SimpleNamespace(note_use=lambda folder: None, checkpoints=())
    mesh: Any = SimpleNamespace(device=torch.device("cpu"), layout="", environment=facts)
    lineage: Any = SimpleNamespace(keep=lambda folder, identity: None)
    for damage in (lambda file: file.write_text("steps = ="), Path.unlink):
        damage(tmp_path / "config.toml")
        words = "; the run writes it again when it goes on"
        (told,) = [one for one in said(after_run(tmp_path)) if one.endswith(words)]
        assert told.startswith(f"{tmp_path / 'config.toml'} ")
        RunDirectory(own, own.model, source, lineage, mesh).write_facts({})
        assert told not in said(after_run(tmp_path))


def test_a_run_that_ended_early_goes_on_by_the_same_command(tmp_path: Path) -> None:
    write_run(tmp_path, saved=2, logged=2)
    starts = [{"began": 0.0, "updated": 100.0, "first_step": 0, "last_step": 2, "seconds": {"training": 60.0}}]
    (tmp_path / FILE).write_text(json.dumps({"starts": starts}))
    told = said(after_run(tmp_path))
    assert "1 start in 1 min 40 s, of which steps that count took 60%" in told
    ended = "it ended at step 2 of 9, by a signal, an error or the end of its machine; what it printed says which; run"
    assert [level for words, level in told.items() if words.startswith(ended)] == [Severity.WARNING]
    with open(tmp_path / ".lock", "w") as lock:  # as the same command has it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert said(after_run(tmp_path))["it is running, at step 2 of 9"] is Severity.OK
    storage.directory(tmp_path, 2).rename(storage.directory(tmp_path, 9))
    assert said(after_run(tmp_path))["it is finished, at step 9"] is Severity.OK


def test_a_step_that_hung_is_told_until_the_run_has_passed_it(tmp_path: Path) -> None:
    write_run(tmp_path, saved=2, logged=2)
    (tmp_path / "hang/1").mkdir(parents=True)
    (tmp_path / "hang/1/verdict.json").write_text(json.dumps({"hangs": True, "step": 3, "text": "rank 1 waits"}))
    words = "it hung in step 3: rank 1 waits; run the same command again to go on"
    assert said(after_run(tmp_path))[words] is Severity.FAILURE
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "loss": 1.0}) + "\n")
    assert words not in said(after_run(tmp_path))


def test_a_clock_that_follows_another_server_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "the clock of run.dir's file system differs from this machine's by 3.5 s; let both follow one time server; "
        "times in logs and of files will disagree"
    )
    for ahead in (3.5, 0.1):
        monkeypatch.setattr(before_run, "_write", lambda folder, skew=ahead: (0.1, skew))
        assert (words in said(before_run.disk(config(tmp_path), 10))) is (ahead > 1)


def test_a_full_disk_for_local_checkpoints_gets_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "local"
    monkeypatch.setattr(before_run, "_there", lambda folder: Path("/proc" if folder == local else "/dev/shm"))
    monkeypatch.setattr(before_run, "_write", lambda folder: (0.1, 0.0))
    usage = shutil.disk_usage(tmp_path)
    own = config(tmp_path, local_dir=str(local), local_every=5)
    for free, level in ((10**6, Severity.WARNING), (10**12, Severity.OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        found = list(before_run.disk(own, 10))[-1]
        assert found.level is level and found.found.startswith("checkpoint.local_dir = ")
        words = "local checkpoints would be given up; make room, name a folder on a disk that each node has for itself,"
        assert found.remedy.startswith(words) or level is Severity.OK
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    assert not [one for one in said(before_run.disk(config(tmp_path), 10)) if "checkpoint.local_dir" in one]


def test_a_command_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_run, "PATIENCE", 0.01)
    found = before_run.dry_run("train", ["configs/pretrain/demo.toml"], 1)
    assert str(found) == "failure  the dry run has not ended in 0.0 s; look at the disk that holds the data"
    found = before_run.trial("train", ["configs/pretrain/demo.toml"], 1, config(tmp_path))
    assert str(found) == "failure  two steps have not ended in 0.0 s; start the run, whose watchdog says why"


def test_links_between_ranks_are_told_in_the_words_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the doctor what the command prints; tests/parallel/test_collective_speed.py starts it."""
    ends = [(1, "", "\nerror: no route to host\n"), (1, "", ""), (0, "gloo between 2 ranks: an all-reduce ...\n", "")]
    done = iter([None, *(subprocess.CompletedProcess([], *end) for end in ends)])
    monkeypatch.setattr(before_run, "_run", lambda argv, env: next(done))
    more = "`trivium launch --nnodes 1 --nproc-per-node 2 pretrain.doctor.collective_speed auto` says more"
    for reason in ("", ": no route to host", ""):
        found = before_run.links(2, "auto")
        assert str(found) == f"failure  2 ranks of this machine do not reach each other{reason}; {more}"
    assert before_run.links(2, "auto").level is Severity.OK


def test_a_trial_tells_how_long_the_run_takes(tmp_path: Path) -> None:
    last = {"tokens_per_s": 64.0, "memory_bytes": GIB}
    words = "two steps ran: 64 tokens/s, 1.00 GiB of the first rank; at this speed 20 steps take 20.0 s"
    assert before_run._described(last, config(tmp_path)) == words


def test_another_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"; Trivium is tested with Python {', '.join(PYTHONS)}"
    for version, told in (("3.9", True), (PYTHONS[0], False)):
        monkeypatch.setattr(platform, "python_version_tuple", lambda number=version: (*number.split("."), "1"))
        assert any(one.endswith(words) for one in said(machine(1))) is told


def test_the_limit_of_open_files_is_raised_as_told() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = "1,024 open files are allowed; many ranks and shards need more: ulimit -n 4096"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
        assert said(machine(1))[words] is Severity.WARNING
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
        assert said(machine(1))["4,096 open files are allowed"] is Severity.OK
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_other_limits_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, 2048), resource.RLIMIT_MEMLOCK: (64 * 2**20, 64 * 2**20)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(machine_checks, "INFINIBAND", tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    told = said(machine(1))
    more = "1,024 open files are allowed; many ranks and shards need more: ulimit -n 4096, which only an administrator"
    assert any(one.startswith(f"{more} may set above 2,048") for one in told)
    locked = (
        "64 MiB of memory may be locked; InfiniBand needs it without limit: ulimit -l unlimited, or memlock in "
        "limits.conf"
    )
    assert told[locked] is Severity.WARNING
    limits = dict.fromkeys(limits, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    told = said(machine(1))
    assert locked not in told and told["any number of open files is allowed"] is Severity.OK


def test_shared_memory_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine_checks, "SHARED_MEMORY", tmp_path)
    words = f"free in {tmp_path}; NCCL may need more: give the container --shm-size=8g, or remove files there"
    for free, told in ((GIB // 2, True), (8 * GIB, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert any(one.endswith(words) for one in said(machine(1))) is told
    monkeypatch.setattr(machine_checks, "SHARED_MEMORY", tmp_path / "none")
    assert "no /dev/shm, which only NCCL on one machine needs" in said(machine(1))


def test_gpus_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    names, free = ["H100", "A100"], [10 * GIB, 80 * GIB]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 80 * GIB))
    other = "GPU 0 has 10.0 of 80.0 GiB free; another process uses it: nvidia-smi lists them"
    assert said(machine(2))[other] is Severity.WARNING
    unequal = "2 GPUs: H100, A100; the slowest sets the pace; choose equal ones by CUDA_VISIBLE_DEVICES"
    assert said(machine(2))[unequal] is Severity.WARNING
    many = "and 3 ranks; start at most 2 here, or set parallel.backend=gloo to share one slowly"
    assert said(machine(3))[f"2 GPUs: H100, A100, {many}"] is Severity.FAILURE
    names[1], free[0] = names[0], 80 * GIB
    assert said(machine(2))["2 GPUs: H100"] is Severity.OK and other not in said(machine(2))
