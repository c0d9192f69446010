"""Finds tasks of lm-evaluation-harness on disk, and runs them with a `TriviumLM`.

A task is named by its name, by its YAML file, or by a folder, which stands for all tasks in the YAML files of that
folder. Names are looked up in the folders that the user gives and then among the harness's own tasks, whose data must
be in the cache of `datasets`: nothing is downloaded. Importing this module imports `lm_eval`, which takes seconds.
"""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval.api import metrics  # noqa: F401  (registers the harness's metrics)
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from configs.loader import ConfigError
from pretrain.evaluation import humaneval, text_metrics
from pretrain.evaluation.harness_model import TriviumLM, generation_settings

# Errors of `datasets` and `huggingface_hub` about data that are not on this machine.
NOT_HERE = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")
# Words of errors of `datasets` about a file without documents, and a split that has none after process_docs.
NO_DOCUMENTS = ("StopIteration", "IndexError: Invalid key: 0 is out of bounds for size 0")
_EMPTY = "has no documents in its test_split or validation_split; correct its file or its data"
SEED = 1234  # of the choice of n-shot examples


@dataclass(frozen=True)
class LoadedTasks:
    """Loaded tasks by name, with their data, and what the harness needs to run them."""

    manager: TaskManager
    tasks: dict[str, Any]
    groups: dict[str, Any]

    def documents(self, limit: int | None) -> dict[str, int]:
        """Returns the number of documents of each task that are evaluated, at most `limit` of each."""
        counts = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        return {name: count if limit is None else min(limit, count) for name, count in counts.items()}


def load_tasks(
    names: Sequence[str],
    folders: Sequence[str | Path] = (),
    humaneval_file: str | None = None,
    unsafe: bool = False,
    num_fewshot: int | None = None,
    key: str = "--tasks",
) -> LoadedTasks:
    """Loads tasks by names, files or folders. Raises ConfigError naming the one that cannot be loaded, and why.

    Without `unsafe`, a task is refused that runs programs outside of the sandbox. `num_fewshot` is the number of solved
    examples in each prompt, instead of what the task says, unless that is 0. `key` is the option or config key that
    names the tasks.
    """
    text_metrics.register()
    paths = [Path(folder) for folder in folders]
    for folder in paths:
        if not folder.is_dir():
            raise ConfigError(f"--task-folder {folder} is no folder; name one with YAML files of tasks")
    with _quiet():
        manager, specs = _specs(names, paths, humaneval_file, key)
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for name, spec in specs:
            try:
                loaded = manager.load([spec])
            except ConfigError:
                raise
            except Exception as error:  # whatever a task's file, functions or data raise
                raise ConfigError(f"task {name} {_reason(error)}") from error
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
    for name, task in tasks.items():
        _check(name, task, unsafe)
        _choose_shots(name, task, num_fewshot, "--num-fewshot" if key == "--tasks" else "eval.num_fewshot")
    return LoadedTasks(manager, tasks, groups)


def run_tasks(
    model: TriviumLM, tasks: LoadedTasks, limit: int | None = None, keep_samples: bool = False
) -> dict[str, Any]:
    """Returns {"scores": {task: scores}, "groups": {group: scores}, "samples": {task: [record]}} of loaded tasks.

    Scores have {measure: value} in "measures", None for what is no finite number. The random numbers are seeded as in
    the harness, so that the same examples are chosen.
    """
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=SEED)
    with _quiet(), _seeded():
        found: Any = evaluate(
            lm=model,
            task_dict={"tasks": tasks.tasks, "groups": tasks.groups},
            limit=limit,
            bootstrap_iters=0,
            log_samples=keep_samples,
            apply_chat_template=model.chat,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=True,  # `load_tasks` has refused what was not allowed
        )
    shots, sizes = found["n-shot"], found["n-samples"]
    scores = {
        name: {"measures": _measures(values), "num_fewshot": shots[name], "documents": sizes[name]["effective"]}
        for name, values in found["results"].items()
        if name in tasks.tasks
    }
    groups = {name: {"measures": _measures(values)} for name, values in found.get("groups", {}).items()}
    return {"scores": scores, "groups": groups, "samples": found.get("samples") or {}}


def _specs(
    names: Sequence[str], folders: Sequence[Path], humaneval_file: str | None, key: str
) -> tuple[TaskManager, list[tuple[str, Any]]]:
    """Returns the harness's index of tasks, and for each given name the task or group that it stands for."""
    own = _manager(folders, include_defaults=False)
    known = own
    found: list[tuple[str, Any]] = []
    missing: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += [(task, str(file)) for task, file in _tasks_in(path, key)]
        elif path.is_file():
            found.append((name, str(path)))
        elif name == humaneval.NAME and name not in own.all_tasks:
            found.append((name, humaneval.task(humaneval_file)))
        elif name in own.all_tasks:
            found.append((name, name))
        else:
            missing.append(name)
    if missing:
        known = _manager(folders, include_defaults=True)  # takes seconds
        for name in missing:
            if name not in known.all_tasks:
                close = get_close_matches(name, [*known.all_tasks, humaneval.NAME], n=3)
                hint = f" (did you mean {' or '.join(close)}?)" if close else ""
                other = ", or give their folder by --task-folder" if key == "--tasks" else ""
                raise ConfigError(
                    f"{key} {name} is no folder, no file and no task's name{hint}; name a folder with YAML files of "
                    f"tasks{other}"
                )
            found.append((name, name))
    return known, found


def _manager(folders: Sequence[Path], include_defaults: bool) -> TaskManager:
    """Returns the index of the tasks in folders, with the harness's own tasks if asked to."""
    manager = TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)
    manager._factory = _FilesBesideTasks()
    return manager


class _FilesBesideTasks(TaskFactory):
    """Maker of tasks for which relative paths of data begin at the task's folder, where there is such a file.

    To the harness itself they begin at the working directory.
    """

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        if entry.yaml_path:
            folder = Path(entry.yaml_path).absolute().parent
            _check_metrics(entry.name, config)
            for key in ("data_files", "data_dir"):
                if key in (config.get("dataset_kwargs") or {}):
                    config["dataset_kwargs"][key] = _beside(config["dataset_kwargs"][key], folder)
        return config


def _beside(value: Any, folder: Path) -> Any:
    """Returns paths, in lists and dicts too, as paths in `folder` if they exist there; they may have wildcards."""
    if isinstance(value, dict):
        return {key: _beside(inner, folder) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_beside(inner, folder) for inner in value]
    is_there = isinstance(value, str) and not Path(value).is_absolute() and "://" not in value
    return str(folder / value) if is_there and any(folder.glob(value)) else value


def _check_metrics(name: str, config: dict[str, Any]) -> None:
    """Raises ConfigError for a metric that nobody registered, for which the harness would ask the network."""
    for entry in config.get("metric_list") or ():
        metric = entry.get("metric") if isinstance(entry, dict) else None
        if config.get("process_results") or callable(metric) or (isinstance(entry, dict) and entry.get("hf_evaluate")):
            continue
        if metric not in metric_registry:
            close = get_close_matches(str(metric), [*metric_registry], n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"Trivium's are {', '.join(text_metrics.NAMES)}"
            raise ConfigError(f"task {name} has the metric {metric!r}, which does not exist; {hint}")


def _tasks_in(folder: Path, key: str) -> list[tuple[str, Path]]:
    """Returns the names and files of the tasks in a folder; raises ConfigError if there is none."""
    for file in sorted(folder.rglob("*.yaml")):  # the harness passes over what it cannot read
        try:
            load_yaml(file, resolve_func=False, recursive=False)
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}; correct it") from None
    index = TaskManager(include_path=folder, include_defaults=False).task_index
    found = [(name, entry.yaml_path) for name, entry in sorted(index.items()) if entry.kind.name in ("TASK", "PY_TASK")]
    if not found:
        raise ConfigError(
            f"{key} {folder} has no task in it; put YAML files with a `task:` key there, such as docs/evaluation.md "
            "shows"
        )
    return found


def _check(name: str, task: Any, unsafe: bool) -> None:
    """Raises ConfigError for a task that cannot be run."""
    if getattr(task, "UNSAFE_CODE", False) and not unsafe:
        raise ConfigError(
            f"task {name} runs programs that the model writes, without limits; add --run-unsafe-code to allow that, or "
            f"use {humaneval.NAME}, which runs them in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name} shows images, and Trivium's models read text alone; leave it out")
    functions = getattr(task, "_metric_fn_list", {})
    if task.config.process_results is None:
        if gone := [metric for metric, function in functions.items() if function is None]:
            raise ConfigError(
                f"task {name} has the metric {gone[0]} of the package evaluate, which is not on this machine; use "
                f"another in its file, such as {', '.join(text_metrics.NAMES)}"
            )
        if task.multiple_target and (both := sorted(functions.keys() & set(text_metrics.GRADED))):
            raise ConfigError(
                f"task {name} has several references for a document, and the harness then makes {both[0]} 0 or 1; give "
                "one reference by doc_to_target, or compute the metric in process_results"
            )
    if task.OUTPUT_TYPE == "generate_until":
        generation_settings(name, task.config.generation_kwargs or {})
    if not len(task.eval_docs):
        raise ConfigError(f"task {name} {_EMPTY}")


def _choose_shots(name: str, task: Any, wanted: int | None, option: str) -> None:
    """Sets the number of solved examples in a prompt; raises ConfigError if the task has fewer."""
    own = task.get_config("num_fewshot")
    chosen = own if own == 0 or (wanted is None and own is not None) else wanted or 0
    task.set_config(key="num_fewshot", value=chosen)
    if not chosen or task.OUTPUT_TYPE == "loglikelihood_rolling" or not hasattr(task, "sampler"):
        return
    have = len(task.sampler.fewshot_docs())
    if _shows_evaluated_documents(task):
        have -= 1
        # The harness leaves a document out of its own examples if this is so, and not if a task has one split alone.
        task.fewshot_cfg.split = task.config.test_split
    if chosen > have:
        raise ConfigError(
            f"task {name} has {max(0, have)} solved examples to show, and each prompt is to have {chosen}; set "
            f"{option} to {max(0, have)} or less, or name a larger fewshot_split in its file"
        )


def _shows_evaluated_documents(task: Any) -> bool:
    """Whether the solved examples come from the documents that are evaluated."""
    config, given = task.config, task.fewshot_cfg
    if given.split is None and given.samples is not None:
        return False
    shown = given.split or config.training_split or config.validation_split or config.test_split
    return bool(shown == (config.test_split or config.validation_split))


def _measures(values: dict[str, Any]) -> dict[str, float | None]:
    """Returns {"measure" or "measure, filter": value} of a task's result, leaving out standard errors."""
    found: dict[str, float | None] = {}
    for key, value in values.items():
        measure, _, filtered = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not measure.endswith("_stderr") and filtered:
            name = measure if filtered == "none" else f"{measure}, {filtered}"
            found[name] = float(value) if math.isfinite(value) else None
    return found


def _reason(error: Exception) -> str:
    """Returns why a task cannot be loaded, and what to do, as a sentence without its subject."""
    text = " ".join(str(error).split())
    if f"{type(error).__name__}: {text}".startswith(NO_DOCUMENTS):
        return _EMPTY
    if type(error).__name__ in NOT_HERE:
        return (
            f"cannot be loaded: its data are not on this machine ({text[:200]}); put them into files and name these in "
            "dataset_kwargs.data_files of a copy of the task's file, or run once with HF_HUB_OFFLINE=0, which "
            "downloads them"
        )
    if "module script" in text:  # of the package evaluate, which fetches it
        return (
            f"cannot be loaded: code of one of its metrics is not on this machine ({text[:200]}); use another metric "
            "in a copy of the task's file, or run once with HF_HUB_OFFLINE=0, which downloads it"
        )
    return f"cannot be loaded: {type(error).__name__}: {text[:400]}; correct its file"


@contextmanager
def _seeded() -> Iterator[None]:
    """Seeds all random numbers as the harness does, and puts them back as they were at the end."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the harness's log, which repeats what the command line says, below errors."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
