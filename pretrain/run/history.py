"""History of a run: a list of data spans, which are ranges of steps with the same data and settings.

A new data span begins where a run is resumed with other data or settings, or passes over samples. Where the run's
folder is, its log and its trackers do not count as settings. The list is in every checkpoint's manifest and in
history.json in the run's folder. Each data span has these keys:

first_step, first_sample    its first step and that step's first sample; both count from 0
global_batch_size           rows per step
data, plan                  fingerprint of the batch source, and the plan's folder (None for other sources)
facts                       description of the data by settings and checksums, `BatchSource.facts`
config                      the whole resolved config

Changes of `parallel` count as changes of settings, although a layout changes results only by rounding.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs import files, loader
from configs.differences import Changes, changes, words
from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.run_history import FILE
from configs.section import Section
from configs.train import OptimizerConfig, ScheduleConfig, TrainerConfig, TrainSection
from pretrain.schedule import learning_rate

DataSpan = dict[str, Any]

# Beginnings of keys that are no settings of the training, or whose change shows in the data's fingerprint.
NOT_LISTED = ("run.dir", "log.", "tracking.", "data.plan")
# Beginnings of keys that change no number of the training.
NEUTRAL = (*NOT_LISTED, "checkpoint.", "eval.", "task.eval_prompts")


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Returns the keys of two configs whose values differ and that may change the numbers of the training."""
    return {key: pair for key, pair in changes(before, after).items() if not key.startswith(NEUTRAL)}


def listed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """Returns the settings of two configs that differ, those of checkpoints and evaluations among them."""
    return {key: pair for key, pair in changes(before, after).items() if not key.startswith(NOT_LISTED)}


def completed(schema: type[BaseModel], config: Mapping[str, Any]) -> dict[str, Any]:
    """Completes a config of an earlier version by the defaults of keys that are new in `schema`.

    The config may have a model even if the schema has none. A config that the schema refuses is returned unchanged.
    """
    own = {key: value for key, value in config.items() if key in schema.model_fields}
    try:
        model = loader.plain(loader.validate(ModelConfig, config["model"]))
        return {**config, **loader.plain(loader.validate(schema, own)), "model": model}
    except (ConfigError, KeyError):
        return dict(config)


class _RateConfig(Section):
    """The sections that the learning rate depends on; those of pretraining, SFT and GRPO are the same."""

    train: TrainSection
    """The number of steps."""
    optimizer: OptimizerConfig
    """The peak of the rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The rate over the steps."""


def describe_changes(last: DataSpan, config: TrainerConfig, now: DataSpan) -> list[str]:
    """Describes what changes between the data spans `last` and `now`, and whether the learning rate jumps there.

    A line is, for example, `optimizer.lr 0.001 -> 0.01 from step 40 on`. `config` is the config of `now`.
    """
    step = now["first_step"]
    before = last.get("config", {})
    lines = [f"{line} from step {step} on" for line in words(listed(before, now["config"]))]
    lines += [f"{line} from step {step} on" for line in _data_changes(last, now)]
    try:
        old = loader.validate(_RateConfig, {key: before[key] for key in _RateConfig.model_fields if key in before})
    except ConfigError:  # written by another version of Trivium
        return lines
    end = old.schedule.steps or old.train.steps
    old_rate, new_rate = (
        learning_rate(min(step, end - 1) if one is old else step, one.train.steps, one.optimizer.lr, one.schedule)
        for one in (old, config)
    )
    if step < end and old_rate != new_rate:
        lines.append(
            f"the learning rate of step {step} is {new_rate:.4g}; the schedule up to now would have made it "
            f"{old_rate:.4g}"
        )
    elif old.schedule.kind != "constant" and old_rate != new_rate:
        lines.append(
            f"the schedule had ended at a learning rate of {old_rate:.4g}, but step {step} has {new_rate:.4g}; to "
            "train in several parts on one schedule, set schedule.steps to the steps of all parts together"
        )
    return lines


def append_span(data_spans: Sequence[DataSpan], now: DataSpan) -> list[DataSpan]:
    """Returns the history with the data span `now` at its end, if it does not go on just like the last one.

    Its data or settings may differ, or samples may be passed over before it.
    """
    # A data span that begins at or after this step was never trained on in this run.
    earlier = [one for one in data_spans if one["first_step"] < now["first_step"]]
    if (
        earlier
        and earlier[-1]["data"] == now["data"]
        and not passed_over(earlier[-1], now)
        and not listed(earlier[-1].get("config", {}), now["config"])
    ):
        return earlier
    return [*earlier, now]


def passed_over(before: DataSpan, after: DataSpan) -> range:
    """Returns the samples between two data spans that were not trained on."""
    steps = after["first_step"] - before["first_step"]
    return range(before["first_sample"] + steps * before["global_batch_size"], after["first_sample"])


def describe_spans(data_spans: Sequence[DataSpan]) -> list[str]:
    """Describes each data span in one sentence: its first step and sample, its data, and which settings changed."""
    sentences = []
    for i, one in enumerate(data_spans):
        rows = f"{one['global_batch_size']} rows a step" + (f" of {one['plan']}" if one["plan"] else "")
        parts = [f"from step {one['first_step']}, sample {one['first_sample']:,}: {rows}"]
        if i and "config" in one and "config" in data_spans[i - 1]:
            parts += words(listed(data_spans[i - 1]["config"], one["config"]))
        if i:
            parts += _data_changes(data_spans[i - 1], one)
        if i and (passed := passed_over(data_spans[i - 1], one)):
            parts.append(f"samples {passed.start:,} to {passed.stop - 1:,} were passed over")
        sentences.append("; ".join(parts))
    return sentences


def _data_changes(before: DataSpan, after: DataSpan) -> list[str]:
    """Describes how the data of two data spans differ: by settings of the mixture if any differ, without checksums."""
    if before["data"] == after["data"]:
        return []
    found = changes(before.get("facts", {}), after.get("facts", {}))
    # Distillation has the facts of its plan below `data`.
    settings = {key.removeprefix("data."): found[key] for key in found if key.startswith(("mixture.", "data.mixture."))}
    return words(settings) or [f"other data than of {before['plan']}" if before["plan"] else "other data"]


def write(run_dir: Path, data_spans: Sequence[DataSpan]) -> None:
    """Writes history.json into a run's folder."""
    files.write_atomic(run_dir / FILE, (json.dumps(data_spans, indent=1, ensure_ascii=False) + "\n").encode())
