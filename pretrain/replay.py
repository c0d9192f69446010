"""`trivium replay RUN --step N`: takes one step of a pretraining run again, with all that it computes recorded.

trivium launch --nproc-per-node 2 replay runs/demo/pretrain --step 640

It begins from the newest checkpoint before the step, or from the beginning, takes the steps between, and prints the
step's loss and gradient norm, norms of every layer, and the loss and the documents of each sample. The run's folder
gets only replay/step_N.json. In the layout that the run had, all numbers are those of its metrics.jsonl, bit for bit.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from launch import bootstrap

    bootstrap.begin("pretrain.replay")

import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import run_history
from configs.cli import command_parser, entrypoint
from configs.files import write_atomic
from configs.layout import SEQ_LENGTH, Layout
from configs.loader import ConfigError, validate
from configs.train import PretrainConfig
from launch.environment import ClusterEnvironment, is_main, report_to_torchrun
from pretrain.logs.metrics_file import read_metrics
from pretrain.report.drawn_metrics import read_json
from pretrain.run.plan_choice import choose_plan
from pretrain.train import make_trainer

if TYPE_CHECKING:
    from pretrain.run.history import DataSpan
    from pretrain.trainer import Trainer

FOLDER = "replay"
FAILED = 1
# Values of a line of the log that are not computed from the model and the data.
VARYING = ("tokens_per_s", "mfu", "memory_bytes", "save_copy_s", "loss_spike", "grad_norm_spike", "skipped")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium replay",
        "Takes one step of a pretraining run again, and shows all that it computes.",
        "trivium replay runs/demo/pretrain --step 640",
    )
    parser.add_argument("run", type=Path, help="a pretraining run's directory")
    parser.add_argument("--step", type=int, required=True, help="number of the step, as in metrics.jsonl, from 1 on")
    args = parser.parse_args(argv)
    run, step = args.run, args.step
    spans = _spans(run, step)
    checkpoint = _checkpoint(run, step, spans, _last_step(run))
    config = _config(run, spans)
    env = ClusterEnvironment.read()
    layout = _layout(config, env.world_size, run, step)

    from pretrain.health.recording import StepRecorder
    from pretrain.parallel import groups
    from pretrain.run.step_log import NonFiniteStep

    with groups.joined(env, layout, config.parallel.backend) as mesh:
        choice = choose_plan(spans[-1]["plan"], run)
        if choice.plan.fingerprint != spans[-1]["data"]:
            raise ConfigError(
                f"{choice.plan.path} is not the plan that step {step} of {run} was trained on; restore that one there: "
                f"the SHA-256 of its plan.json begins with {spans[-1]['data'][:12]}"
            )
        trainer = make_trainer(config, choice, None, mesh, str(checkpoint) if checkpoint else "no")
        recorder, failure, found = StepRecorder(trainer.engine), "", {}
        try:
            found = trainer.replay(step, recorder)
        except NonFiniteStep as failed:
            if failed.step.number != step:
                raise
            failure = f"{failed}{trainer.first_not_finite(failed.step.batches)}"
        record = _record(trainer, recorder.gathered(), found, failure)
        record |= {"from": str(checkpoint) if checkpoint else "the beginning", "layout": str(layout)}
        if mesh.is_main:
            record |= {"recorded_layout": _recorded_layout(run), "recorded": _recorded(run, step)}
            path = run / FOLDER / f"step_{step}.json"
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(record, indent=1).encode())
            print("\n".join([*_lines(record), f"all of it is in {path}"]), flush=True)
    return FAILED if failure else 0


def _spans(run: Path, step: int) -> "list[DataSpan]":
    """Returns the run's data spans up to the one with step `step`. Raises ConfigError if there is no such step."""
    spans = run_history.read(run)
    if not spans or any(one["plan"] is None for one in spans) or "data" not in spans[-1].get("config", {}):
        raise ConfigError(f"{run} is not the folder of a pretraining run; name one, such as runs/demo/pretrain")
    last = _last_step(run)
    first = spans[0]["first_step"] + 1
    if not first <= step <= last:
        raise ConfigError(f"--step {step}: {run} took steps {first} to {last}; give one of them")
    return [one for one in spans if one["first_step"] < step]


def _last_step(run: Path) -> int:
    """Returns the newest step of a run that is in its log or has a checkpoint."""
    from pretrain.checkpoint import storage

    logged = read_metrics(run / "metrics.jsonl").records
    return max([*storage.steps(run), *(record["step"] for record in logged)], default=0)


def _checkpoint(run: Path, step: int, spans: "Sequence[DataSpan]", last: int) -> Path | None:
    """Returns the newest whole checkpoint before `step`; None for the beginning of a run that began with step 1.

    `last` is the run's last step. Raises ConfigError if the steps from there on had other settings or data than step
    `step`.
    """
    from pretrain.checkpoint import storage
    from pretrain.run import history

    path, problems = storage.find_newest(run, before=step)
    begin = int(path.name.removeprefix("step_")) if path else 0
    other = any(
        history.changed(one["config"], spans[-1]["config"]) or one["data"] != spans[-1]["data"]
        for one, after in pairwise(spans)
        if after["first_step"] > begin
    )
    if other or (path is None and (spans[0]["first_step"] or spans[0]["config"].get("init"))):
        kept = ", ".join(str(one) for one in storage.steps(run)) or "none"
        why = f" ({'; '.join(problems)})" if problems else ""
        begun_from = (storage.find_newest(run, before=one + 1)[0] for one in storage.steps(run) if step <= one < last)
        later = next((int(one.name.removeprefix("step_")) + 1 for one in begun_from if one and one != path), None)
        remedy = f"give --step {later}" if later else "no later step has one either"
        raise ConfigError(
            f"--step {step}: {run} has no checkpoint between the last change of its settings or data and this step, "
            f"only those of steps {kept}{why}; {remedy}, and keep more by checkpoint.keep_every in later runs"
        )
    return path


def _config(run: Path, spans: "Sequence[DataSpan]") -> PretrainConfig:
    """Returns the config of the last span, with a folder of its own, and with the samples that the run passed over."""
    from pretrain.run import history

    tree = {key: value for key, value in spans[-1]["config"].items() if key != "init"}
    passed = [history.passed_over(one, after) for one, after in pairwise(spans)]
    spikes = tree.get("spikes", {})
    ranges = [*spikes.get("pass_over", []), *([one.start, one.stop] for one in passed if one)]
    tree |= {
        "run": {**tree["run"], "dir": str(run / FOLDER)},
        "checks": {"every": 0},
        "checkpoint": {},  # nothing is fetched, copied or saved
        "spikes": {**spikes, "action": "log" if spikes.get("action") == "rewind" else spikes.get("action", "log")}
        | {"pass_over": ranges},
    }
    return validate(PretrainConfig, tree, origin=f"{run}/{run_history.FILE}")


def _layout(config: PretrainConfig, world: int, run: Path, step: int) -> Layout:
    try:
        return Layout.of(world, config.parallel, config.model, config.train, given=(SEQ_LENGTH,))
    except ConfigError as error:
        recorded = _world(run)
        command = f"trivium launch --nproc-per-node {recorded} replay {run} --step {step}"
        raise ConfigError(f"the run had {recorded} ranks, and here are {world}: run `{command}` ({error})") from None


def _facts(run: Path) -> dict[str, Any]:
    return read_json(run / "env.json")


def _world(run: Path) -> int:
    return int(_facts(run).get("launcher", {}).get("world_size", 1))


def _recorded_layout(run: Path) -> str:
    return str(_facts(run).get("layout", ""))


def _recorded(run: Path, step: int) -> dict[str, Any]:
    """Returns the step's line of the run's log; {} if there is none, as of a step that failed."""
    records = read_metrics(run / "metrics.jsonl").records
    return next((record for record in records if record["step"] == step and "loss" in record), {})


def _record(trainer: "Trainer", gathered: dict[str, Any], found: dict[str, Any], failure: str) -> dict[str, Any]:
    for sample in gathered["samples"]:
        sample["source"] = trainer.source.sources[sample["source"]]
        sample["described"] = trainer.source.describe(sample["sample"])
    return {
        "step": trainer.step,
        "metrics": {name: value for name, value in found.items() if name not in VARYING},
        "failure": failure,
        **gathered,
    }


def _lines(record: dict[str, Any]) -> list[str]:
    """Returns the lines to print."""
    metrics = record["metrics"]
    lines = [f"step {record['step']}, from {record['from']}, layout {record['layout']}"]
    if record["failure"]:
        lines.append(record["failure"])
    else:
        lines += [f"loss {metrics['loss']!r}  gradient norm {metrics['grad_norm']!r}  lr {metrics['lr']:.4g}"]
        lines.append(_agreement(record))
    titles = ("activation norm", "largest activation", "gradient norm", "weight norm")
    columns = [record[title.replace(" ", "_")] for title in titles]
    names = list(dict.fromkeys(name for column in columns for name in column))
    names.sort(key=lambda name: (name.startswith("final") or name == "lm head", not name.startswith(("emb", "pos"))))
    lines.append("\n" + f"{'':<20}" + "".join(f"{title:>20}" for title in titles))
    for name in names:
        values = "".join(f"{_shown(column.get(name)):>20}" for column in columns)
        lines.append(f"{name:<20}{values}")
    lines.append(f"\n{'loss':>10}{'largest logit':>15}  sample")
    by_loss = sorted(record["samples"], key=lambda one: -_rank_of(one["loss"]))
    lines += [f"{_shown(one['loss']):>10}{_shown(one['largest_logit']):>15}  {one['described']}" for one in by_loss]
    return [*lines, ""]


def _agreement(record: dict[str, Any]) -> str:
    """Says whether the numbers are those of the run's log."""
    before = {name: value for name, value in record["recorded"].items() if name not in VARYING}
    if not before:
        return "the run's metrics.jsonl has no line of this step to compare with"
    differing = [name for name, value in before.items() if record["metrics"].get(name, value) != value]
    if not differing:
        return f"equal to the run's metrics.jsonl bit for bit: {', '.join(before)}"
    told = "; ".join(f"{name} {record['metrics'].get(name)!r}, not {before[name]!r}" for name in differing)
    if record["layout"] != record["recorded_layout"]:
        return f"not the layout of the run, {record['recorded_layout']}, so rounding may differ: {told}"
    return f"NOT equal to the run's metrics.jsonl: {told}"


def _rank_of(loss: float | None) -> float:
    return -math.inf if loss is None else math.inf if math.isnan(loss) else loss


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


if __name__ == "__main__":
    entrypoint(main, sys.argv[1:], prints_errors=is_main(), on_error=report_to_torchrun)
