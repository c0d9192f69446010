"""Output folders that cannot be written to: each command that has one refuses it by a sentence that names the key."""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from configs import cli
from configs.cli import entrypoint
from configs.folders import check_run_dir, check_writable
from configs.loader import ConfigError, Failure
from configs.train import TrainRunConfig
from data_pipeline.command import main as data_run
from export import publishing
from export.huggingface import main as export
from posttrain import dpo, grpo, ppo, rm, sft
from pretrain import train
from pretrain.checkpoint.fetching import newer_manifest
from pretrain.proof import prove as prove

IN_OWN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
HAS_NAMESPACES = subprocess.run([*IN_OWN_NAMESPACE, "true"], capture_output=True).returncode == 0
COMMANDS: dict[str, tuple[Callable[[Sequence[str] | None], int], list[str]]] = {
    "run.dir": (train.main, ["configs/pretrain/demo.toml", "run.dir={folder}"]),
    "run.dir of sft": (sft.main, ["configs/posttrain/demo_sft.toml", "run.dir={folder}", "init.run={base}"]),
    "run.dir of rm": (rm.main, ["configs/posttrain/demo_rm.toml", "run.dir={folder}", "init.run={base}"]),
    "run.dir of dpo": (dpo.main, ["configs/posttrain/demo_dpo.toml", "run.dir={folder}", "init.run={base}"]),
    "run.dir of ppo": (ppo.main, ["configs/posttrain/demo_ppo.toml", "run.dir={folder}", "init.run={base}"]),
    "run.dir of grpo": (grpo.main, ["configs/posttrain/demo_grpo.toml", "run.dir={folder}", "init.run={base}"]),
    "--out": (prove.main, ["configs/pretrain/demo.toml", "--layouts", "tp2", "--out", "{folder}"]),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Folder of a run that seems to have a checkpoint."""
    (tmp_path / "base/checkpoints/step_1").mkdir(parents=True)
    return tmp_path / "base"


@pytest.mark.parametrize("key", COMMANDS)
def test_a_file_is_no_folder_and_has_none(tmp_path: Path, base: Path, key: str) -> None:
    main, argv = COMMANDS[key]
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(ConfigError) as refused:
            main([word.format(folder=out, base=base) for word in argv])
        words = f"{key.split()[0]} = {str(out)!r}: {tmp_path / 'file'} is a file; name a folder"
        assert str(refused.value) == words


@pytest.mark.parametrize("name", ["checkpoints", "rollouts", "reference"])
def test_a_file_in_place_of_a_runs_folder_is_found_at_the_start(tmp_path: Path, base: Path, name: str) -> None:
    (tmp_path / name).touch()
    for command in ("run.dir", "run.dir of sft", "run.dir of grpo"):
        main, argv = COMMANDS[command]
        with pytest.raises(ConfigError, match=rf"^run\.dir = '{tmp_path}': {tmp_path / name} is a file; name a folder"):
            main([word.format(folder=tmp_path, base=base) for word in argv])
    (tmp_path / name).unlink()
    check_run_dir(tmp_path)


def test_checkpoints_on_a_disk_that_is_not_there_are_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"checkpoints leads to .*disk, which is not there; mount its disk, make th"):
        check_run_dir(tmp_path)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"run leads to .*disk, which is not there; mount its disk"):
        check_run_dir(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    check_run_dir(tmp_path)
    check_run_dir(tmp_path / "run")


@pytest.mark.parametrize("name", ["metrics.jsonl", "tokenizer.model", "time.json"])
def test_a_folder_in_place_of_a_runs_file_is_found_at_the_start(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=rf"{name} is a folder; name another run\.dir, or remove it"):
        check_run_dir(tmp_path)
    check_run_dir(tmp_path / "another")
    (tmp_path / name).rmdir()
    check_run_dir(tmp_path)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("ledger.json", "is the folder of a data run; name a folder of the run's own"),
        ("../stage.json", "a stage of a data run, which is replaced as a whole when it is made again; name a folder"),
        ("plan.json", "is the folder of a data plan; name a folder of the run's own"),
        ("model.safetensors", "is a Hugging Face folder; name a folder of the run's own"),
    ],
)
def test_a_training_run_does_not_write_into_a_folder_of_something_else(file: str, words: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken/here"
    taken.mkdir(parents=True)
    (taken / "config.json").touch()
    check_run_dir(taken)
    (taken / file).touch()
    with pytest.raises(ConfigError, match=words):
        check_run_dir(taken)
    check_run_dir(tmp_path / "own")


def test_a_data_run_does_not_write_into_a_folder_of_a_training_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    folder = f"run.dir={tmp_path}"
    with pytest.raises(ConfigError, match="is the folder of a training run; name one of the data run's own"):
        data_run(["configs/data/demo.toml", "--dry-run", folder])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_only_a_shell_expands_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~/run", "$HOME/run", "${HOME}/run"):
        with pytest.raises(ConfigError, match="~ and variables are a shell's, and not read here; write ") as refused:
            check_run_dir(name)
        written = str(refused.value).rpartition("write ")[2]
        assert written == str(tmp_path / "home/run")
        check_run_dir(written)
    check_run_dir("$no_such_variable/~run")
    with pytest.raises(ConfigError, match=r"^checkpoint\.mirror = '~/copy': ~ and variables are a shell's"):
        newer_manifest(tmp_path, "~/copy", None, is_new=True)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_end_a_command_by_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: Sequence[str] | None) -> int:
        raise FloatingPointError("step 2: the loss is not finite; lower optimizer.lr and run the command again")

    with pytest.raises(SystemExit) as ended:
        entrypoint(main, [])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: step 2: the loss is not finite; lower optimizer.lr and run the command again, without the newest "
        "checkpoint if it ends there again\n"
    )


def test_an_empty_name_is_not_the_working_directory() -> None:
    for main, argv in ((train.main, "configs/pretrain/demo.toml run.dir="), (export, "configs/export/demo.toml out=")):
        with pytest.raises(ConfigError, match=r"(run\.dir|out) = '': string should have at least 1 character"):
            main(argv.split())
    assert TrainRunConfig(dir=".").name == TrainRunConfig(dir="configs/..").name == Path.cwd().name


def test_the_folder_of_an_exported_or_imported_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for key in ("out", "OUT"):
        refused = pytest.raises(ConfigError, match=rf"^{key} = .*file/model': .*file is a file; name a folder")
        with refused, publishing.partly_written(tmp_path / "file/model", key):
            pass


def test_a_folder_that_will_do_is_left_as_it_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b", "run.dir")
    check_writable(tmp_path, "run.dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not HAS_NAMESPACES, reason="this system lets no user mount a file system of his own")
@pytest.mark.parametrize(
    ("options", "fill", "check", "words"),
    [
        ("ro", "true", "check_writable", "is on a read-only file system; name a folder"),
        ("size=16k", "head -c 16384 /dev/zero > full", "check_writable", "the file system is full; make room"),
        (
            "ro",
            "true",
            "check_can_hold",
            "so that run.dir cannot be written; copy the run's folder",
        ),
    ],
)
def test_a_read_only_and_a_full_file_system(tmp_path: Path, options: str, fill: str, check: str, words: str) -> None:
    (tmp_path / "disk").mkdir()
    script = f"import sys; from configs import folders; folders.{check}(sys.argv[1], 'run.dir')"
    mount = f'mount -t tmpfs -o {options} none {tmp_path / "disk"} && cd {tmp_path / "disk"} && {fill}; exec "$@"'
    command = [*IN_OWN_NAMESPACE, "sh", "-c", mount, "sh", sys.executable, "-c", script, str(tmp_path / "disk/run")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert f"ConfigError: run.dir = '{tmp_path}/disk/run': " in done.stderr and words in done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o700, 0o755], ids=["closed", "open"])
def test_a_folder_of_another_user(tmp_path: Path, mode: int) -> None:
    for above in (tmp_path, *tmp_path.parents):
        if above == Path(tempfile.gettempdir()):
            break
        above.chmod(0o755)
    tmp_path.chmod(mode)
    script = (
        "import os, sys; from configs.folders import check_writable\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); check_writable(sys.argv[1], 'run.dir')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a/run")], capture_output=True, text=True)
    assert f"ConfigError: run.dir = '{tmp_path}/a/run': this user may not write there; name another" in done.stderr


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "runs/a/report.html is closed to this user; name another, or have its permissions changed"),
        (errno.EROFS, "runs/a/report.html is on a read-only file system; name another file or folder"),
        (errno.ENAMETOOLONG, "the file system takes no name as long as runs/a/report.html; give a shorter one"),
        (errno.EIO, "runs/a/report.html cannot be read or written (Input/output error); see to its disk, then run the"),
        (errno.EISDIR, "runs/a/report.html is a folder, and should be a file; remove or rename it"),
        (errno.ENOSPC, "no space is left on disk for runs/a/report.html; make room, then run the same command again"),
    ],
)
def test_a_file_that_is_found_closed_later_is_one_sentence(
    capsys: pytest.CaptureFixture[str], number: int, words: str
) -> None:
    def main(_: Sequence[str] | None) -> int:
        raise OSError(number, os.strerror(number), "runs/a/report.html")

    told: list[str] = []
    with pytest.raises(SystemExit) as ended:
        entrypoint(main, [], on_error=told.append)
    assert ended.value.code == 1 and words in told[0] and capsys.readouterr().err == f"{told[0]}\n"


@pytest.mark.parametrize("of_all_ranks", [False, True])
def test_a_fault_that_all_ranks_raise_together_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, of_all_ranks: bool
) -> None:
    """Runs one rank that is not the main one, which prints what it may have found alone."""

    class FoundByRank(Failure):
        pass

    def main(_: Sequence[str] | None) -> int:
        raise FoundByRank("the file is damaged")

    FoundByRank.of_all_ranks = of_all_ranks
    monkeypatch.setattr(cli, "TURN_SECONDS", 0)
    with pytest.raises(SystemExit) as ended:
        entrypoint(main, [], prints_errors=False)
    assert ended.value.code == 1
    assert capsys.readouterr().err == ("" if of_all_ranks else "error: the file is damaged\n")
