"""Why a recipe stopped before its end, and what to do: words for the screen and for the recipe's report."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.signals import STOPPED
from launch.recipe_stages import RecipeStage

SIGNALLED = (STOPPED, 129, 130, 143)  # statuses of an interrupted stage; the last three: SIGHUP, SIGINT, SIGTERM
LOG_END = 1 << 20  # bytes of a log in which its reason is looked for
RAISED = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Expired)\b.*")  # last line of a Python traceback


@dataclass(frozen=True)
class Stop:
    """Words on what happened and on what to do; `stage` is the one that did not finish, if any, with its log.

    `how` says in a word how that stage ended.
    """

    what: str
    remedy: str
    stage: RecipeStage | None = None
    how: str = ""
    log: Path = Path()


def misses(stage: RecipeStage, missed: Sequence[str]) -> Stop:
    """Returns the stop behind a stage that finished, whose gates `missed` describes."""
    return Stop(
        f"Stage {stage.title} is finished, but misses its gates: {'; '.join(missed)}. The recipe stopped there.",
        f"Its result stays in {stage.output}. Change the stage's config or overrides, remove its folder and run the "
        f"same command again to repeat it; or lower the bounds of stages.{stage.name}.gates and run the same command "
        "again to go on with it.",
    )


def fails(stage: RecipeStage, status: int, log: Path, begin: int) -> Stop:
    """Returns the stop in a stage that failed or was interrupted; its output begins at byte `begin` of its log."""
    if status in SIGNALLED:
        return Stop(
            f"Interrupted in stage {stage.title}.",
            "Run the same command again: finished stages are skipped, and this one continues from what it has saved.",
            *(stage, "interrupted", log),
        )
    said = _killed(status) if status > 128 else reason(log, begin)
    return Stop(
        f"Stage {stage.title} failed with exit status {status}{f': {said}' if said else ''}. The recipe stopped there.",
        f"The stage's output is in {log}; to run it alone: {command_line(stage)}. After fixing it, run the same "
        "command again: it continues with this stage.",
        *(stage, "failed", log),
    )


def reason(log: Path, begin: int) -> str:
    """Returns the sentence with which a stage told its failure, without a full stop; "" if it told none.

    It is the last line that begins with "error:", or else the exception at the end of the last traceback.
    """
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - LOG_END))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or [line for line in lines if RAISED.fullmatch(line)] or [""])[-1].removesuffix(".")


def command_line(stage: RecipeStage) -> str:
    """Shell command that runs the stage alone."""
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    return shlex.join([python, "-m", *stage.command])


def _killed(status: int) -> str:
    number = status - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"it was killed by {name}" + ", as systems do when memory is full" * (number == signal.SIGKILL)
