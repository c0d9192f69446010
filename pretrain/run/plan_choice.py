"""Choice of the plan that a run trains on: the one at data.plan, or the one it was begun on.

A data run that makes a new plan keeps the earlier ones. A training run that was begun on an earlier plan goes on with
the new one only if both have the same rows for all samples trained on so far and for all later ones that both have;
else it goes on with its own. Whether the plan fits the checkpoint is checked by `pretrain.checkpoint.resume`. This
module imports torch only if there is a checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from data_pipeline.core.integrity import DamagedData
from data_pipeline.mixture.earlier import differences, find, first_difference, was_at
from data_pipeline.mixture.rows import Plan


@dataclass(frozen=True)
class PlanChoice:
    """The plan that a run trains on, and how it relates to the plan that the run was begun on.

    `common_samples` has the fingerprint of the earlier plan, with how many of the run's first samples are the same in
    both. `reason` is a sentence for the user if the choice was not obvious, else None.
    """

    plan: Plan
    common_samples: dict[str, int] = field(default_factory=dict)
    reason: str | None = None


def own_plan(manifest: Mapping[str, Any]) -> str | None:
    """Returns the fingerprint of the plan that a checkpoint's pretraining run was trained on; None for a new run."""
    found = manifest.get("identity", {}).get("data")
    return None if found is None else str(found)


def choose_plan(
    location: str,
    run_dir: Path,
    resume: str = "auto",
    mirror: str | None = None,
    wanted_by: Callable[[Mapping[str, Any]], str | None] = own_plan,
) -> PlanChoice:
    """Chooses the plan of the run in `run_dir`, where `location` is data.plan and `resume` the value of --resume.

    A run whose folder is lost may have a checkpoint in its `mirror`. `wanted_by` returns the fingerprint of the run's
    own plan from a checkpoint's manifest.

    Raises ConfigError if there is no plan, DamagedData if the plan at `location` or the run's own one is damaged.
    """
    missing, current = None, None
    try:
        current = Plan.open(location)
    except DamagedData:
        raise
    except (ValueError, OSError) as error:
        missing = ConfigError(f"data.plan = {location!r}: {error}")
    manifest = _manifest(run_dir, resume, mirror)
    wanted = wanted_by(manifest)
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
            reason = (
                f"{location} has a new plan since the run was started; its first {samples:,} samples are those of the "
                "run's own plan, so the run goes on with the new one"
            )
            return PlanChoice(current, {own.fingerprint: own.first_sample + samples}, reason)
        if was_at(own, location):
            reason = (
                f"{location} has a new plan since the run was started ({differences(own.facts, current.facts)}; it "
                f"differs from sample {different:,} on), so the run goes on with its own plan, kept in {own.path}"
            )
            return PlanChoice(own, reason=reason)
    if own is not None and current is None and was_at(own, location):
        reason = f"{location} is gone, so the run goes on with its own plan, kept in {own.path}"
        return PlanChoice(own, reason=reason)
    if current is None:
        assert missing is not None
        raise missing
    return PlanChoice(current)


def _manifest(run_dir: Path, resume: str, mirror: str | None) -> dict[str, Any]:
    """Returns the manifest of the checkpoint that the run goes on from; empty for a new run.

    Checkpoints whose manifest cannot be read are skipped.
    """
    if resume == "no" or not (mirror or (run_dir / "checkpoints").is_dir() or Path(resume).is_dir()):
        return {}
    from pretrain.checkpoint import storage

    own = [storage.directory(run_dir, step) for step in reversed(storage.steps(run_dir))]
    for path in [*own, *([Path(resume)] if resume != "auto" else [])]:
        try:
            return storage.read_manifest(path)
        except storage.CheckpointError:
            continue
    if mirror:
        from pretrain.checkpoint.mirror import newest_manifest

        return newest_manifest(mirror)
    return {}
