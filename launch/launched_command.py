"""The command that is launched: one of `trivium`, with its config, which is checked before anything is started.

Knows which commands run on ranks, which go on where they were when they are started again, and the folder that a
command writes. Imports no torch, so that a mistake is found on a login node and not in a job hours later.
"""

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.config_kind import OVERRIDE, command_for, kind_of, kind_of_command
from configs.kinds import schema_of
from configs.layout import SEQ_LENGTH, Layout
from configs.loader import ConfigError, filled_tree, validate
from configs.train import PretrainConfig
from launch.bootstrap import ON_RANKS, TRAINING

# Modules of the commands that are one process and no ranks, and the key of the folder that each writes.
SINGLE = {"data run": "data_pipeline.command", "export": "export.huggingface", "recipe run": "launch.recipe"}
FOLDER_KEYS = {"export": "run", "recipe run": "dir"}  # an export's own folder appears only once it is whole


@dataclass(frozen=True)
class LaunchedCommand:
    """A command to start: the name and module, the arguments after it, and what the launcher must know of it.

    `folder` is the one that the command writes, None for a module that is not a command. `trains` is whether it runs on
    ranks, and `resumes` whether the same command started again goes on where it was.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    folder: Path | None
    trains: bool
    resumes: bool

    @property
    def config(self) -> Path | None:
        """The config file; None for a module that is not a command."""
        return Path(self.arguments[0]) if self.folder is not None else None


def module_of(name: str, is_job: bool = False) -> str:
    """Module to run: that of a command that trains (train, sft, grpo), or `name` itself. Raises ConfigError if none.

    `is_job` says that commands of one process could be launched as well, as jobs.
    """
    if name in ON_RANKS:
        return ON_RANKS[name]
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # the parent is no package; the name is not valid
        found = None
    if found is not None and found.submodule_search_locations is None:
        return name
    raise ConfigError(
        f"{name!r} cannot be started as ranks: give {', '.join(ON_RANKS)}, or a module as for `python -m`"
        f"{_meant(name, is_job)}"
    )


def _meant(name: str, is_job: bool) -> str:
    """Returns what a word that is no command that can be launched may have meant, as the end of a sentence."""
    if name == "trivium":
        return "; leave out the word 'trivium'"
    if name == "chat":
        return "; a chat reads what is typed, and is started as `trivium chat RUN`, without `launch`"
    inside = [command for command, module in ON_RANKS.items() if module.startswith(f"{name}.")]
    rooms = ("pretrain", "posttrain", "export") if name.isidentifier() else ()
    modules = [f"{room}.{name}" for room in rooms if _is_module(f"{room}.{name}")]
    spelled = name.lower().removesuffix(".py").replace("/", ".")
    known = [*ON_RANKS, *ON_RANKS.values(), *SINGLE, *SINGLE.values()]
    close = inside or modules or difflib.get_close_matches(spelled, known, n=1)
    alone = next((command for command, module in SINGLE.items() if close in ([command], [module])), None)
    if alone and is_job:
        return f"; did you mean `{alone}`?"
    if alone:
        return f"; `trivium {alone} CONFIG` is one process on one machine, and is started without `launch`"
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _is_module(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.submodule_search_locations is None


def check_is_ranks(words: Sequence[str]) -> None:
    """Raises ConfigError for the words of a command that is one process, and not ranks, or of one that is misspelt."""
    if alone := _check_spelling(words):
        raise ConfigError(f"`{alone}` is one process on one machine; start it as `trivium {' '.join(words)}`")


def _check_spelling(words: Sequence[str]) -> str:
    """Returns the command of one process that words begin with, "" if none; raises ConfigError if it is misspelt."""
    alone = [name for name in SINGLE if name.split()[0] == words[0]]
    if not alone:
        return ""
    said = " ".join(words[: len(alone[0].split())])
    if said not in alone:
        raise ConfigError(f"`{said}` is no command that can be launched; did you mean `{alone[0]}`?")
    return said


def check_input(module: str, arguments: Sequence[str], nproc_per_node: int) -> None:
    """Raises ConfigError for a module that reads what is typed, which no rank of `trivium launch` can."""
    if module == "export.chat":
        raise ConfigError(
            "export.chat reads what is typed, and the ranks of `trivium launch` have no input; start it as torchrun "
            f"--nproc-per-node {nproc_per_node} -m {' '.join([module, *arguments])}"
        )


def is_command(word: str) -> bool:
    """Whether a word is the first of a command that can be launched, or a config, whose keys tell its command."""
    return word in TRAINING or word in (name.split()[0] for name in SINGLE) or word.endswith(".toml")


def command_of(config: str, arguments: Sequence[str]) -> str:
    """Returns the command that a config is for, by its keys. Raises ConfigError if it cannot be told, or launched."""
    if kind_of(config, arguments) == "launch":
        raise ConfigError(
            f"{config} is a config of `trivium launch` itself: give it as --cluster {config}, and after it a "
            "command with a config of its own"
        )
    return command_for(config, arguments, (*TRAINING, *SINGLE), "cannot be launched")


def read_command(words: Sequence[str], world_size: int) -> LaunchedCommand:
    """Reads the words after `trivium launch` and its options: a command, its config, overrides and options.

    The config is checked by its schema and, where a data plan, another model or a checkpoint need not be read for it,
    its layout by the number of ranks. Raises ConfigError for a mistake.
    """
    name = next((one for one in (" ".join(words[:2]), words[0]) if one in SINGLE or one in TRAINING), "")
    if not name:
        _check_spelling(words)
        return LaunchedCommand(
            words[0], module_of(words[0], is_job=True), tuple(words[1:]), None, trains=True, resumes=True
        )
    arguments = tuple(words[len(name.split()) :])
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"the config comes first after `{name}`, as in `trivium launch {name} CONFIG`")
    folder = _folder(name, arguments, world_size)
    module = SINGLE.get(name) or TRAINING[name]
    return LaunchedCommand(name, module, arguments, folder, name in TRAINING, name != "export")


def _folder(name: str, arguments: Sequence[str], world_size: int) -> Path:
    """Returns the folder that a command writes, after its config has been checked."""
    schema = schema_of(kind_of_command(name))
    tree = filled_tree(schema, arguments[0], [word for word in arguments[1:] if OVERRIDE.match(word)])
    if not (name == "train" and tree.get("init")):  # such a config takes its model from files of another run
        config = validate(schema, tree, origin=arguments[0])
        if isinstance(config, PretrainConfig):
            Layout.of(world_size, config.parallel, config.model, config.train, given=(SEQ_LENGTH,))
    value: Any = tree
    for key in (folder_key := FOLDER_KEYS.get(name, "run.dir")).split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise ConfigError(f"{arguments[0]}: key {folder_key!r} is missing; set it in the file or as {folder_key}=VALUE")
    return Path(value)
