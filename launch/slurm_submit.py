"""`trivium launch --on slurm`: writes the script of a job beside what the command writes, and submits it.

The folder `launch/N` in the command's own folder gets the script, a copy of the config and the job's output, and
`launch/code` a copy of Trivium's code, so that edits after the submission reach no job. A recipe becomes a chain of
jobs, one a stage, each of which waits for the one before it.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.folders import check_writable
from configs.launch import LaunchConfig
from configs.loader import ConfigError, load
from configs.recipe import RecipeConfig
from launch.launched_command import LaunchedCommand
from launch.slurm_script import SlurmJob
from launch.snapshot import snapshot


@dataclass(frozen=True)
class Submission:
    """Request of a user: the command, the cluster, jobs to wait for, and whether to print the scripts alone."""

    command: LaunchedCommand
    config: LaunchConfig
    after: tuple[str, ...] = ()
    job_dir: str = ""
    dry_run: bool = False


def submit(submission: Submission) -> int:
    """Renders the job or jobs, and submits them unless it is a dry run. Raises ConfigError if that cannot be."""
    _check(submission)
    jobs = (
        Path(submission.job_dir) if submission.job_dir else Path(submission.command.folder or ".", "launch")
    ).absolute()
    if "\\" in str(jobs) or not str(jobs).isprintable():
        raise ConfigError(f"{str(jobs)!r} cannot hold the output of a Slurm job; choose another path")
    if not submission.dry_run:
        check_writable(jobs, "--job-dir" if submission.job_dir else f"the folder of `{submission.command.name}`")
    code, missing = snapshot(jobs / "code", copy=False), [one for one in (jobs, *jobs.parents) if not one.exists()]
    is_new = not code.exists()
    folder = _numbered(jobs, submission.dry_run)
    job = SlurmJob(
        command=_with_copied_config(submission.command, folder, submission.dry_run),
        config=submission.config,
        python=python_of(submission.config),
        folder=Path.cwd(),
        code=snapshot(jobs / "code", copy=not submission.dry_run),
        script=folder / "job.sh",
        after=submission.after,
    )
    before = submission.after
    for one in _stages(job):
        one = replace(one, after=before)
        if submission.dry_run:
            print(f"# {one.script}\n{one.render()}")
            number = f"JOB-OF-{one.script.stem}"
        else:
            one.script.write_text(one.render(), encoding="utf-8")
            one.script.chmod(0o755)
            try:
                number = _sbatch(one.script)
            except ConfigError:
                if before == submission.after:  # no job that needs them was submitted
                    _remove([folder, *([code] if is_new else [])], [code.parent, *missing])
                raise
            waits = f", after {', '.join(before)}" if before else ""
            print(f"submitted job {number}{waits}: {one.script}\n  its output: {folder / f'{number}.log'}", flush=True)
        before = (number,)
    return 0


def _remove(written: Sequence[Path], made: Sequence[Path]) -> None:
    """Removes what a refused submission has written, and the folders that were made for it, if they are empty."""
    for folder in written:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):  # not empty, or gone
            folder.rmdir()


def python_of(config: LaunchConfig) -> str:
    """Returns the Python of the nodes: the config's, or this one; a path is made absolute, and no link is followed."""
    python = config.python or sys.executable
    return os.path.abspath(python) if "/" in python else python


def _check(submission: Submission) -> None:
    """Raises ConfigError for what no Slurm job can have."""
    if submission.config.hosts:
        raise ConfigError("hosts names machines, and Slurm chooses them itself; set nnodes, and leave hosts out")
    if submission.config.setup and not Path(submission.config.setup).is_file():
        raise ConfigError(f"setup = {submission.config.setup!r} is no file; write the shell commands into one")
    if submission.command.folder is None and not submission.job_dir:
        raise ConfigError(
            f"{submission.command.name} is a module and names no folder for its job; give one, as in --job-dir runs/job"
        )
    words = submission.command.arguments
    if "--resume=no" in words or ("--resume", "no") in itertools.pairwise(words):
        raise ConfigError("--resume no would refuse to go on after a requeue; leave it out, and name another run.dir")
    given = [word for word in words if word.startswith(("--until", "--only"))]
    if given and submission.command.name == "recipe run":
        raise ConfigError(f"{given[0]} is for a recipe that runs here; leave it out, each stage is a job of its own")
    if wrong := [job for job in submission.after if not (job.isascii() and job.isdecimal())]:
        raise ConfigError(f"--after {wrong[0]} is no number of a job; squeue lists them")
    if not submission.dry_run and shutil.which("sbatch") is None:
        raise ConfigError(
            "--on slurm needs the command sbatch, which is not on PATH; run where jobs are submitted, or add --dry-run "
            "before the command to print the script"
        )


def _numbered(jobs: Path, dry_run: bool) -> Path:
    """Makes the folder of this submission in `jobs`, numbered from 1, and returns it; a dry run makes none."""
    for number in itertools.count(1):
        folder = jobs / str(number)
        if dry_run and not folder.exists():
            break
        try:
            if not dry_run:
                folder.mkdir(parents=True)
                break
        except FileExistsError:
            continue
    return folder


def _with_copied_config(command: LaunchedCommand, folder: Path, dry_run: bool) -> LaunchedCommand:
    """Returns the command with a copy of its config in `folder`; a recipe's stages name files that are not copied."""
    if command.config is None or command.name == "recipe run":
        return command
    copy = folder / command.config.name
    if not dry_run:
        shutil.copyfile(command.config, copy)
    return replace(command, arguments=(str(copy), *command.arguments[1:]))


def _stages(job: SlurmJob) -> list[SlurmJob]:
    """Returns the jobs of a recipe, one a stage, or the one job of another command."""
    command = job.command
    if command.name != "recipe run":
        return [job]
    overrides = [word for word in command.arguments[1:] if not word.startswith("-")]
    recipe = load(RecipeConfig, command.arguments[0], overrides)
    return [
        replace(
            job,
            command=replace(command, arguments=(*command.arguments, "--only", name)),
            script=job.script.with_name(f"{name}.sh"),
            name=f"trivium-{name}",
        )
        for name in recipe.stages
    ]


def _sbatch(script: Path) -> str:
    """Submits a script and returns the number of its job. Raises ConfigError with Slurm's words if it is refused."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error:", "").split())
        raise ConfigError(
            f"sbatch refused the job: {said}; correct the launch config, mostly its slurm.* keys (--dry-run before the "
            "command prints the script)"
        )
    return done.stdout.strip().partition(";")[0]
