"""Which plan a pretraining run trains on: the one at data.plan, or the one that was there when the run began.

A data run that makes other plans keeps the earlier ones. A run that was begun on one of those goes on with the new one
only if it begins with the same samples, row by row; else with its own. It imports torch only where there is a
checkpoint. Whether the plan is right for the checkpoint is left to checkpoint/resume.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from data_pipeline.core.integrity import DamagedData
from data_pipeline.mixture.earlier import differences, find, first_difference, was_at
from data_pipeline.mixture.rows import Plan


@dataclass(frozen=True)
class Choice:
    """`same` has fingerprints of earlier plans, with how many of the run's samples this plan has in common with them.

    `said` tells why the plan is not simply the one at data.plan, as it was.
    """

    plan: Plan
    same: dict[str, int] = field(default_factory=dict)
    said: str | None = None


def choose_plan(location: str, run_dir: Path, resume: str = "auto") -> Choice:
    """Errors: ConfigError where there is no plan; DamagedData where it, or the run's own, is damaged."""
    missing, current = None, None
    try:
        current = Plan.open(location)
    except DamagedData:
        raise
    except (ValueError, OSError) as error:
        missing = ConfigError(f"data.plan = {location!r}: {error}")
    manifest = _manifest(run_dir, resume)
    wanted = manifest.get("identity", {}).get("data")
    own = None
    if wanted is not None and not (current and wanted in (current.fingerprint, current.after)):
        try:
            own = find(location, wanted)
        except DamagedData:
            raise
        except ValueError as error:
            raise ConfigError(f"data.plan = {location!r}: the plan that {run_dir} was trained on: {error}") from None
    if own is not None and current is not None:
        used = manifest["samples"] - own.first_sample
        samples = max(used, min(own.num_samples, current.num_samples))
        different = first_difference(current, own, samples)
        if different is None:
            said = f"{location} has other plans by now, which begin with the {samples:,} samples of the run's own"
            return Choice(current, {own.fingerprint: own.first_sample + samples}, said)
        if was_at(own, location):
            said = (
                f"{location} has another plan by now ({differences(own.facts, current.facts)}; it differs from sample "
                f"{different:,} on), and the run goes on with its own, kept in {own.path}"
            )
            return Choice(own, said=said)
    if own is not None and current is None and was_at(own, location):
        return Choice(own, said=f"{location} is gone, and the run goes on with its plan as it was kept in {own.path}")
    if current is None:
        assert missing is not None
        raise missing
    return Choice(current)


def _manifest(run_dir: Path, resume: str) -> dict[str, Any]:
    """Of the checkpoint that the run goes on from, if it is whole; empty for a new run."""
    if resume == "no" or not ((run_dir / "checkpoints").is_dir() or Path(resume).is_dir()):
        return {}
    from pretrain.checkpoint import storage

    own = [storage.directory(run_dir, step) for step in reversed(storage.steps(run_dir))]
    for path in [*own, *([Path(resume)] if resume != "auto" else [])]:
        try:
            return storage.read_manifest(path)
        except storage.CheckpointError:
            continue
    return {}
