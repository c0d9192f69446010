"""Check, before a command starts its work, that its output folder can be written to."""

import errno
import os
import tempfile
from pathlib import Path

from configs.loader import ConfigError

# What is wrong and what to do about it, by error number.
REASONS = {
    errno.EROFS: "it is on a read-only file system; name a folder that can be written to",
    errno.EACCES: "this user may not write there; name another folder, or have its permissions changed",
    errno.EPERM: "this user may not write there; name another folder, or have its permissions changed",
    errno.ENOSPC: "the file system is full; make room, or name a folder on another one",
    errno.EDQUOT: "the disk quota is used up; make room, or name a folder on another file system",
}
_PROBE_BYTES = 4096
# Names in the folder of a training run.
RUN_FOLDERS = ("checkpoints", "base", "rollouts", "reference", "tensorboard", "compiled", "profile", "hang")
RUN_FILES: tuple[str, ...] = (
    *("metrics.jsonl", "config.toml", "env.json", "history.json", "time.json", "report.html", ".lock", "mirror_id"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "loss_mask.json"),
    *("samples.jsonl", "rewinds.json", "tracking.json", "local.json"),
)


def check_writable(folder: str | Path, key: str, value: str | Path | None = None) -> None:
    """Tries to write a temporary file in `folder`, or in the nearest folder above it that exists.

    Raises ConfigError if that fails; the message names `key` and its `value`, by default the folder.
    """
    check_expanded(folder, key, value)
    folder = Path(folder)
    try:
        there = next((path for path in (folder, *folder.parents) if path.exists()), Path())
        with tempfile.TemporaryFile(dir=there) as probe:  # without a name, so that the folder's own time stays
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        named = str(folder if value is None else value)
        raise ConfigError(f"{key} = {named!r}: {_reason(folder, error)}") from None


def check_expanded(folder: str | Path, key: str, value: str | Path | None = None) -> None:
    """Raises ConfigError if a shell would make another path of `folder`, which would else be made as it is written."""
    if (whole := os.path.expanduser(os.path.expandvars(folder))) != str(folder):
        named = str(folder if value is None else value)
        raise ConfigError(f"{key} = {named!r}: ~ and variables are a shell's, and not read here; write {whole}")


def check_can_hold(run_dir: Path, name: str) -> None:
    """Checks that a file `name` about a finished run can be written to the run's folder. Raises ConfigError."""
    try:
        check_writable(run_dir, "run.dir")
    except ConfigError as error:
        what = str(error).partition(";")[0]
        raise ConfigError(
            f"{what}, so that {name} cannot be written; copy the run's folder, and name the copy as run.dir"
        ) from None


def check_run_dir(run_dir: str | Path) -> None:
    """Checks that a training run can write to its folder and to what is in it already. Raises ConfigError naming it.

    A file in place of a folder, or the other way round, would else be found at the first save, hours later; and in a
    folder of something else, each would write over the other's files.
    """
    if other := _other_owner(Path(run_dir)):
        raise ConfigError(f"run.dir = {str(run_dir)!r} is {other}; name a folder of the run's own")
    check_writable(run_dir, "run.dir")
    for name in ("", *RUN_FOLDERS):
        if (link := Path(run_dir, name)).is_symlink() and not link.exists():
            raise ConfigError(
                f"run.dir = {str(run_dir)!r}: {link} leads to {os.readlink(link)}, which is not there; mount its disk, "
                "make that folder, or remove the link"
            )
        if name and (folder := Path(run_dir, name)).exists():
            check_writable(folder, "run.dir", run_dir)
    for name in RUN_FILES:
        if (file := Path(run_dir, name)).is_dir():
            raise ConfigError(f"run.dir = {str(run_dir)!r}: {file} is a folder; name another run.dir, or remove it")


def _other_owner(folder: Path) -> str:
    """Says what `folder` belongs to if that is no training run, "" else."""
    if (folder / "ledger.json").is_file():
        return "the folder of a data run"
    if stage := next((one for one in (folder, *folder.absolute().parents) if (one / "stage.json").is_file()), None):
        return f"in {stage}, a stage of a data run, which is replaced as a whole when it is made again"
    if (folder / "plan.json").is_file():
        return "the folder of a data plan"
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "a Hugging Face folder"
    return ""


def _reason(folder: Path, error: OSError) -> str:
    # os.path.exists does not raise if a folder above cannot be entered; `error` already says that.
    file = next((path for path in (folder, *folder.parents) if os.path.exists(path) and not os.path.isdir(path)), None)
    if file is not None:
        return f"{file} is a file; name a folder"
    return REASONS.get(error.errno or 0, f"nothing can be written there ({error.strerror}); name another folder")
