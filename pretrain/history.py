"""A run's history: its spans of steps, each with one plan and one config, however often the run was resumed.

It is a list of plain entries, in every checkpoint's manifest and as history.json in the run's folder:

first_step, first_sample    where the data span begins; both count from 0
global_batch_size           rows a step
data, plan                  the fingerprint of what is trained on, and where a plan is (None for other data)
facts                       what the data are, in words and checksums that can be compared
config                      the whole resolved config

Leaves out the layout's effect on rounding: `parallel` is listed as any other key, although it changes nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs import files, loader
from configs.differences import Changes, changes, words
from configs.loader import ConfigError
from configs.train import ModelConfig, TrainerConfig
from pretrain.schedule import learning_rate

FILE = "history.json"
DataSpan = dict[str, Any]

# Keys that change no number of the training, or that the data's fingerprint stands for.
NEUTRAL = ("run.dir", "log.", "checkpoint.", "eval.", "task.eval_prompts", "data.plan")


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Keys of two configs that differ and may change the numbers."""
    return {key: pair for key, pair in changes(before, after).items() if not key.startswith(NEUTRAL)}


def completed(schema: type[BaseModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that was written earlier, with the defaults of keys that the schema has got since.

    It may have a model where the schema has none. What does not fit the schema any more is returned as it is.
    """
    own = {key: value for key, value in config.items() if key in schema.model_fields}
    try:
        model = loader.plain(loader.validate(ModelConfig, config["model"]))
        return {**config, **loader.plain(loader.validate(schema, own)), "model": model}
    except (ConfigError, KeyError):
        return dict(config)


def news(last: DataSpan, config: TrainerConfig, now: DataSpan) -> list[str]:
    """What changes after the span `last`: `optimizer.lr 0.001 -> 0.01 from step 40 on`, and where the rate jumps."""
    step = now["first_step"]
    before = last.get("config", {})
    said = [f"{line} from step {step} on" for line in words(changed(before, now["config"]))]
    said += [f"{line} from step {step} on" for line in _data_changes(last, now)]
    try:
        old = loader.validate(TrainerConfig, {key: before[key] for key in TrainerConfig.model_fields if key in before})
    except ConfigError:  # of another version of this code
        return said
    end = old.schedule.steps or old.train.steps
    was, becomes = (
        learning_rate(min(step, end - 1) if one is old else step, one.train.steps, one.optimizer.lr, one.schedule)
        for one in (old, config)
    )
    if step < end and was != becomes:
        said.append(f"the learning rate of step {step} is {becomes:.4g}, and was to be {was:.4g}")
    elif old.schedule.kind != "constant" and was != becomes:
        said.append(
            f"the schedule was over, at {was:.4g}, and step {step} has a learning rate of {becomes:.4g}; a run in "
            "several parts keeps to one schedule by schedule.steps"
        )
    return said


def go_on(data_spans: Sequence[DataSpan], now: DataSpan) -> list[DataSpan]:
    """The history with a data span that begins `now`, if it is not like the last one."""
    # One that begins here too was never trained on.
    earlier = [one for one in data_spans if one["first_step"] < now["first_step"]]
    if earlier and earlier[-1]["data"] == now["data"] and not changed(earlier[-1].get("config", {}), now["config"]):
        return earlier
    return [*earlier, now]


def told(data_spans: Sequence[DataSpan]) -> list[str]:
    """Of each data span one sentence: where it begins, its data, and which settings changed."""
    said = []
    for i, one in enumerate(data_spans):
        rows = f"{one['global_batch_size']} rows a step" + (f" of {one['plan']}" if one["plan"] else "")
        parts = [f"from step {one['first_step']}, sample {one['first_sample']:,}: {rows}"]
        if i and "config" in one and "config" in data_spans[i - 1]:
            parts += words(changed(data_spans[i - 1]["config"], one["config"]))
        if i:
            parts += _data_changes(data_spans[i - 1], one)
        said.append("; ".join(parts))
    return said


def _data_changes(before: DataSpan, after: DataSpan) -> list[str]:
    """What is different about the data of two data spans, checksums left out."""
    if before["data"] == after["data"]:
        return []
    found = changes(before.get("facts", {}), after.get("facts", {}))
    settings = {key: pair for key, pair in found.items() if key.startswith("mixture.")}
    return words(settings) or [f"other data than of {before['plan']}" if before["plan"] else "other data"]


def read(run_dir: Path) -> list[DataSpan]:
    """The history in a run's folder; empty where there is none."""
    path = run_dir / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def write(run_dir: Path, data_spans: Sequence[DataSpan]) -> None:
    files.write_atomic(run_dir / FILE, (json.dumps(data_spans, indent=1, ensure_ascii=False) + "\n").encode())
