"""The drills: each breaks a run in one way, starts it again, and says what happened and whether it should have.

Faults come from outside: signals, a limit of the size of files, changed bytes on disk. That of `nan` alone is planted
in the process of one rank (see `planted`).
"""

import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGSTOP, Signals

from configs.layout import Layout
from configs.signals import HUNG
from configs.train import PretrainConfig
from pretrain.drill.drilled_run import DrilledRun
from pretrain.drill.small_config import EVERY, STEPS
from pretrain.drill.verdicts import SAME, DrillOutcome, Numbers

SAVED = 2 * EVERY  # the newest checkpoint when most faults come
AFTER = SAVED + 2  # the step after which they come
PLANTED = "pretrain.drill.planted"
NAMES_RANK = re.compile(r"^rank \d+ (?:was killed by|ended with)[^;]*", re.MULTILINE)
NOT_FINITE = re.compile(r"step \d+: .*not finite.*|step \d+ is a spike: .*|.*; going back to .*")


@dataclass(frozen=True)
class Setting:
    """The runs of a drill: their config and layout, and the numbers of the run that nothing happened to."""

    config: PretrainConfig
    layout: Layout
    undisturbed: Numbers

    @property
    def last_rank(self) -> int:
        return self.layout.world_size - 1


@dataclass(frozen=True)
class Drill:
    """A way to break a run: what it does, in words, and why it cannot be done here, "" if it can be."""

    what: str
    do: "Callable[[Setting, DrilledRun, DrillOutcome], None]"
    why_not: "Callable[[PretrainConfig, Layout], str]" = lambda config, layout: ""


def kill(setting: Setting, run: DrilledRun, outcome: DrillOutcome) -> None:
    """Kills one rank by SIGKILL."""
    began, status = _signalled(setting, run, outcome, SIGKILL)
    outcome.said = _last(NAMES_RANK, run)
    outcome.expect(status not in (0, 2), f"the first start ended with status {status}, as if no rank had died")
    outcome.expect(bool(outcome.said), "no rank was named")
    _go_on(setting, run, outcome, began)


def stop(setting: Setting, run: DrilledRun, outcome: DrillOutcome) -> None:
    """Stops one rank by SIGSTOP, which the watchdog must find."""
    began, status = _signalled(setting, run, outcome, SIGSTOP)
    outcome.said = next((one for one in run.sentences if "no progress" in one), "")
    outcome.expect(status == HUNG, f"the first start ended with status {status}, not with the watchdog's {HUNG}")
    victim = setting.last_rank
    named = f"rank {victim} gives no sign of life" in outcome.said and "stopped by a signal" in outcome.said
    outcome.expect(named, f"the watchdog did not say that rank {victim} is stopped by a signal")
    _go_on(setting, run, outcome, began)


def nan(setting: Setting, run: DrilledRun, outcome: DrillOutcome) -> None:
    """Makes one number of one rank not finite, to which the run answers as spikes.action says."""
    victim = 0 if setting.layout.pp > 1 else setting.last_rank
    batch, action = setting.config.train.global_batch_size, setting.config.spikes.action
    bad, first = AFTER + 1, AFTER * batch
    words = (str(victim), str(first), str(batch))
    run.start(module=PLANTED, before=words)
    run.wait_for_step(AFTER, SAVED)
    began = time.monotonic()
    outcome.fault = f"a NaN planted in an activation of rank {victim} in step {bad}, with spikes.action={action}"
    if action == "rewind":
        run.wait_for_step(bad)
        outcome.seconds = time.monotonic() - began
    (status,) = _ended(run, outcome)
    outcome.said = _last(NOT_FINITE, run)
    names = setting.layout.zero == 1 and not setting.layout.offload_optimizer and action != "skip"
    if names:
        named = re.search(rf"the first tensor that is not finite is .* on rank {victim}\b", outcome.said)
        outcome.expect(named is not None, f"rank {victim} was not named as the first with a tensor that is not finite")
    outcome.expect(f"step {bad}" in outcome.said, f"step {bad} was not named")
    if action == "log":
        outcome.expect(status == 1, f"the first start ended with status {status}, and not with 1 for a failed step")
        _go_on(setting, run, outcome, began)
        return
    outcome.expect(status == 0, f"the run ended with status {status}, though spikes.action={action} lets it go on")
    found = Numbers.of_run(run.run_dir, STEPS)
    if action == "skip":
        outcome.steps_lost = sum("skipped" in record for record in found.steps.values())
        outcome.expect("skipped" in found.steps.get(bad, {}), f"step {bad} was not skipped")
        different = setting.undisturbed.difference(found, until=bad - 1)
        outcome.numbers = f"different {different}" if different else f"the same until the skipped step {bad}"
        outcome.expect(not different, f"steps before the skipped one are different {different}")
        outcome.expect(bool(found.state), "there is no last checkpoint")
        return
    outcome.steps_lost = bad - SAVED
    other = run.beside("passed_over")
    other.start(overrides=(f"spikes.pass_over=[[{first}, {first + batch}]]",))
    (status,) = other.wait()
    outcome.expect(status == 0, f"the run that passes over the same samples ended with status {status}")
    outcome.compare(Numbers.of_run(other.run_dir, STEPS), found)
    if outcome.numbers == SAME:
        outcome.numbers += ", as those of a run that passes over the step's samples"


def disk(setting: Setting, run: DrilledRun, outcome: DrillOutcome) -> None:
    """Lets no rank write a file as large as its part of a checkpoint, as on a full disk, until the run has ended."""
    run.start()
    run.wait_for_step(AFTER, SAVED)
    parts = (run.run_dir / "checkpoints" / f"step_{SAVED}").glob("*.safetensors")
    limit = min(part.stat().st_size for part in parts) // 2
    began = time.monotonic()
    for process in run.processes.values():
        _, most = resource.prlimit(process, resource.RLIMIT_FSIZE)
        resource.prlimit(process, resource.RLIMIT_FSIZE, (limit, most))
    outcome.fault = (
        f"after step {run.step} no rank can write a file of more than {limit:,} bytes, half of its part of a "
        "checkpoint (RLIMIT_FSIZE, set from outside); then there is room again"
    )
    (status,) = _ended(run, outcome)
    given_up = next((one for one in run.sentences if one.startswith("warning: no checkpoint of step")), "")
    outcome.said = "; ".join([given_up, *(one for one in run.sentences if one.startswith("error: "))])
    outcome.expect(bool(given_up) and run.step == STEPS, "the run did not go on without a checkpoint that it gave up")
    outcome.expect(status == 1, f"the first start ended with status {status}, and not with 1 for its last checkpoint")
    _go_on(setting, run, outcome, began)


def torn(setting: Setting, run: DrilledRun, outcome: DrillOutcome) -> None:
    """Kills all ranks, cuts a file of the newest checkpoint short, and flips a bit in the one before."""
    run.start()
    run.wait_for_step(AFTER + EVERY, SAVED + EVERY)
    began = time.monotonic()
    run.kill_node(0)
    outcome.fault = f"SIGKILL of the launcher and all ranks after step {run.step}"
    _ended(run, outcome)
    *_, whole, flipped, cut = run.steps_saved
    files = [_part(run, cut, setting.last_rank), _part(run, flipped, 0)]
    os.truncate(files[0], files[0].stat().st_size // 2)
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)
    outcome.fault += f"; {_short(files[0])} cut to half of its size, one bit of {_short(files[1])} flipped"
    _go_on(setting, run, outcome, began, whole)
    told = [one for one in run.sentences if any(str(file) in one for file in files)]
    outcome.said = "; ".join(told)
    for file in files:
        outcome.expect(any(str(file) in one for one in told), f"{_short(file)} was not named as damaged")


def node(setting: Setting, run: DrilledRun, outcome: DrillOutcome) -> None:
    """Kills all processes of one of two nodes at once, and starts both again."""
    run.start(nodes=2)
    run.wait_for_step(AFTER, SAVED)
    began = time.monotonic()
    run.kill_node(1)
    half = setting.layout.world_size // 2
    outcome.fault = f"SIGKILL of node 1 of 2, its launcher and its ranks {half} to {setting.last_rank}"
    outcome.fault = outcome.fault.replace(f"ranks {half} to {half}", f"rank {half}") + f", after step {run.step}"
    first, _ = _ended(run, outcome)
    outcome.said = _last(NAMES_RANK, run)
    outcome.expect(first not in (0, 2), f"the launcher of node 0 ended with status {first}, as if no node had died")
    _go_on(setting, run, outcome, began, nodes=2)


def _signalled(setting: Setting, run: DrilledRun, outcome: DrillOutcome, signal: Signals) -> tuple[float, int]:
    """Sends the last rank a signal after a checkpoint; returns when, and the status with which the run then ends."""
    run.start()
    run.wait_for_step(AFTER, SAVED)
    began = time.monotonic()
    run.kill(setting.last_rank, signal)
    outcome.fault = f"{signal.name} of rank {setting.last_rank} after step {run.step}"
    (status,) = _ended(run, outcome)
    return began, status


def _ended(run: DrilledRun, outcome: DrillOutcome) -> list[int]:
    statuses = run.wait()
    outcome.statuses.append(statuses)
    return statuses


def _go_on(
    setting: Setting, run: DrilledRun, outcome: DrillOutcome, began: float, whole: int | None = None, nodes: int = 1
) -> None:
    """Starts the run again, from checkpoint `whole`, by default the newest, and compares its numbers at the end."""
    reached = run.step
    expected = whole if whole is not None else (run.steps_saved or [0])[-1]
    run.start(nodes=nodes)
    run.wait_for_first_step()
    outcome.seconds = time.monotonic() - began
    outcome.steps_lost = reached - run.went_on_from
    statuses = _ended(run, outcome)
    outcome.expect(not any(statuses), f"the run that went on ended with status {max(statuses)}")
    outcome.expect(
        run.went_on_from == expected, f"it went on from step {run.went_on_from}, and not from checkpoint {expected}"
    )
    outcome.compare(setting.undisturbed, Numbers.of_run(run.run_dir, STEPS))


def _last(pattern: re.Pattern[str], run: DrilledRun) -> str:
    found = pattern.findall(run.output)
    return found[-1].strip() if found else ""


def _part(run: DrilledRun, step: int, rank: int) -> Path:
    parts = sorted((run.run_dir / "checkpoints" / f"step_{step}").glob("*.safetensors"))
    return parts[min(rank, len(parts) - 1)]


def _short(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _no_watchdog(config: PretrainConfig, _: Layout) -> str:
    return "" if config.watchdog.enabled else "watchdog.enabled=false, so nobody looks for a rank that is stopped"


def _no_limit(*_: object) -> str:
    return "" if sys.platform == "linux" else "this system lets no process limit the files of another"


def _no_halves(_: PretrainConfig, layout: Layout) -> str:
    odd = layout.world_size % 2
    return f"{layout.world_size} ranks cannot be divided between two nodes; give --nproc-per-node 2 or 4" if odd else ""


DRILLS: Mapping[str, Drill] = {
    "kill": Drill("a rank is killed", kill),
    "stop": Drill("a rank is stopped and no longer answers", stop, _no_watchdog),
    "nan": Drill("a rank computes a number that is not finite", nan),
    "disk": Drill("the disk is full", disk, _no_limit),
    "torn": Drill("the two newest checkpoints are damaged", torn),
    "node": Drill("one of two nodes is lost", node, _no_halves),
}
