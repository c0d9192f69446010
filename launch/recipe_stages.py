"""The stages of a recipe, made from its config: what each runs, writes and starts from, and the gates it must pass."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from configs.loader import ConfigError, read_overridden, read_tree
from configs.model import ModelConfig
from configs.recipe import REFERENCE, GateConfig, RecipeConfig, RecipeStageConfig, SpecimenConfig
from launch.bootstrap import TRAINING
from launch.recipe_inputs import check_config, check_layout, data_files, result_of, tree_hash
from launch.recipe_results import (
    describe_baselines,
    describe_data,
    describe_export,
    describe_samples,
    describe_training,
    measurement,
)

BASELINES = "baselines.json"
MOVED = "the override of run.dir"  # in records of earlier versions; a recipe's folder may be moved
UNIMPORTANT = ("checkpoint", "eval", "log", "parallel")  # sections of a training config that leave the result as it is


@dataclass(frozen=True)
class StageKind:
    """Facts about a command that a recipe runs: its module, the key of its output folder, and its result.

    `mark` is the file in the folder that the command writes last, and `describe` tells what went in and came out.
    """

    module: str
    folder_key: str
    mark: str
    describe: Callable[[Path], tuple[str, str]]


KINDS = {
    "data run": StageKind("data_pipeline.command", "run.dir", "plan/plan.json", describe_data),
    "data baselines": StageKind("data_pipeline.report.baselines", "run.dir", BASELINES, describe_baselines),
    **{name: StageKind(module, "run.dir", "metrics.jsonl", describe_training) for name, module in TRAINING.items()},
    "sample": StageKind("posttrain.sample", "run.dir", "sample.json", describe_samples),
    "export": StageKind("export.huggingface", "out", "trivium_export.json", describe_export),
}


@dataclass(frozen=True)
class RecipeStage:
    """One subprocess of a recipe.

    `command` follows `python -m`. `output` is the directory it writes; the file `mark` in it changes if and only if the
    stage did something. `describe(output)` returns what went in and what came out, as texts for the table. `needs` are
    the stages whose results a training stage starts from. A finished run does not notice by itself that one of them was
    made again or that its own config has changed, so the recipe compares hashes (`made_from`) of stages that `train`. A
    stage that notices, such as an export, has none.
    """

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    mark: str
    describe: Callable[[Path], tuple[str, str]]
    needs: tuple["RecipeStage", ...] = ()
    gates: tuple[GateConfig, ...] = ()
    trains: bool = False
    about: str = ""
    reads: tuple[tuple[str, str], ...] = ()  # name and folder of each of the recipe's inputs that the stage names
    made: Path | None = None  # the recipe's folder

    def made_from(self) -> dict[str, str | None]:
        """Hashes of the results, inputs, data and config that a training stage starts from, and its overrides; else {}.

        Sections of the config that do not change the result are left out. Raises ConfigError for a config that is no
        TOML file.
        """
        if not self.trains:
            return {}
        found = {f"the result of stage {stage.title}": stage.result() for stage in self.needs}
        found |= {f"the input {name}": result_of(Path(folder)) for name, folder in self.reads}
        found |= {f"the data {path}": file_sha256(Path(path)) for path in self.data()}
        for word in self.command:
            if word.endswith(".toml"):
                found[word] = tree_hash({k: value for k, value in read_tree(word).items() if k not in UNIMPORTANT})
            elif "=" in word and word.split(".")[0] not in UNIMPORTANT and not word.startswith("run.dir="):
                key, _, value = word.partition("=")
                found[f"the override of {key}"] = value
        return found

    def changed_since(self, before: Mapping[str, Any] | None) -> list[str]:
        """Names of the inputs that have changed since the stage was finished; `before` is its entry in the record.

        The folder of a stage that it needs may have been moved, together with the record.
        """
        now = self.made_from()
        then = {name: value for name, value in (before or {}).get("made_from", now).items() if name != MOVED}
        ends = [(str(need.output), str(need.output.parent)) for need in self.needs]

        def is_same(old: str | None, new: str | None) -> bool:
            moved = new and old and any(new.startswith(at) and old.endswith(new[len(above) :]) for at, above in ends)
            return old == new or bool(moved)

        return [name for name in {**then, **now} if not is_same(then.get(name), now.get(name))]

    def result(self) -> str | None:
        """Hash of the result that others start from: of the newest checkpoint's manifest, or else of the mark."""
        return result_of(self.output, self.mark)

    def data(self) -> list[str]:
        """The files of examples that the config names, but for those that earlier stages make."""
        config = next((word for word in self.command if word.endswith(".toml")), None)
        if config is None:
            return []
        overrides = self.command[self.command.index(config) + 1 :]
        return data_files(read_overridden(config, overrides), self.made or self.output)

    def measured_gates(self) -> list[tuple[GateConfig, float]]:
        """Returns each gate with what was measured. Raises ConfigError if a gate is on no measurement."""
        found = []
        for gate in self.gates:
            try:
                found.append((gate, measurement(self.output, gate.metric)))
            except KeyError as error:
                raise ConfigError(
                    f"a gate of stage {self.name} is on {gate.metric!r}, which {self.output} did not measure; it "
                    f"measured {error.args[0]}"
                ) from None
        return found

    def missed_gates(self) -> list[str]:
        """Describes each gate that the result does not pass. Raises ConfigError if a gate is on no measurement."""
        return [
            f"{gate.metric} is {gate.shown(value)}, and {gate} is asked"
            for gate, value in self.measured_gates()
            if not gate.passes(value)
        ]

    def fingerprint(self) -> str | None:
        """Hash of the file `mark`; None before the stage first wrote it."""
        path = self.output / self.mark
        return file_sha256(path) if path.is_file() else None

    @property
    def where_to_look(self) -> Path:
        """Path to open first: the stage's report, or else its directory."""
        report = self.output / "report.html"
        return report if report.is_file() else self.output


@dataclass(frozen=True)
class Specimen:
    """A text that a trained model writes at a recipe's end: what `trivium` is called with, and what is typed to it."""

    command: tuple[str, ...]
    typed: str = ""

    def __str__(self) -> str:
        """Shell command that writes the same text again."""
        typed = f"echo {shlex.quote(self.typed)} | " if self.typed else ""
        return typed + shlex.join(["trivium", *self.command])


def stages_of(config: RecipeConfig) -> list[RecipeStage]:
    """Makes the stages of a recipe, in order. Raises ConfigError for a command that is no stage's."""
    made: dict[str, RecipeStage] = {}
    for name, stage in config.stages.items():
        if stage.command not in KINDS:
            raise ConfigError(f"stages.{name}.command = {stage.command!r} is none of {', '.join(KINDS)}")
        made[name] = _stage(name, stage, config, made)
    return list(made.values())


def _stage(name: str, stage: RecipeStageConfig, config: RecipeConfig, made: dict[str, RecipeStage]) -> RecipeStage:
    kind, folder = KINDS[stage.command], Path(config.dir, stage.folder or name)
    trains = stage.command in TRAINING
    if other := next((one for one in made.values() if (one.output, one.mark) == (folder, kind.mark)), None):
        raise ConfigError(
            f"stages.{name} writes into {folder}, as stages.{other.name} does; set stages.{name}.folder to another name"
        )
    if given := [override for override in (*stage.set, *stage.more) if override.startswith(f"{kind.folder_key}=")]:
        raise ConfigError(
            f"stages.{name}.set has {given[0]}, and a recipe's stage writes into a folder of the recipe; leave it out, "
            f"and set stages.{name}.folder to choose its name"
        )
    if stage.gates and not trains:
        raise ConfigError(
            f"stages.{name}.gates: `trivium {stage.command}` measures nothing that a gate could be on; leave them out"
        )
    ranks = ("launch.ranks", "--nproc-per-node", str(stage.ranks or config.ranks)) if trains else ()
    chosen = (*stage.set, *stage.more)
    overrides = [_filled_in(override, made, config.inputs) for override in chosen]
    needed = dict.fromkeys(name for override in chosen for name in REFERENCE.findall(override))
    overrides.append(f"{kind.folder_key}={folder}")
    return RecipeStage(
        name,
        stage.title or name,
        (*ranks, kind.module, stage.config, *overrides),
        folder,
        kind.mark,
        kind.describe,
        tuple(made[name] for name in needed if name in made),
        stage.gates,
        trains,
        stage.about,
        tuple((name, config.inputs[name]) for name in needed if name in config.inputs),
        Path(config.dir),
    )


def specimens_of(config: RecipeConfig, stages: list[RecipeStage]) -> list[Specimen]:
    """Makes the specimens of a recipe, with the folders of its stages filled in."""
    made = {stage.name: stage for stage in stages}
    return [_specimen(specimen, made, config.inputs) for specimen in config.specimens]


def _specimen(specimen: SpecimenConfig, made: Mapping[str, RecipeStage], inputs: Mapping[str, str]) -> Specimen:
    return Specimen(tuple(_filled_in(word, made, inputs) for word in specimen.command), specimen.typed)


def _filled_in(text: str, made: Mapping[str, RecipeStage], inputs: Mapping[str, str]) -> str:
    """Returns the text with each {NAME} replaced by the folder of the stage or input NAME."""
    folders = {**inputs, **{name: str(stage.output) for name, stage in made.items()}}
    return REFERENCE.sub(lambda match: folders[match[1]], text)


def check_configs(config: RecipeConfig, stages: list[RecipeStage]) -> None:
    """Raises ConfigError if the config of a stage is missing, not valid with its overrides, or does not fit its ranks.

    A stage that earlier stages feed is checked with the model that they will have made.
    """
    models: dict[str, ModelConfig] = {}
    for stage in stages:
        settings = config.stages[stage.name]
        if not Path(settings.config).is_file():
            raise ConfigError(
                f"stages.{stage.name}.config = {settings.config!r} does not exist; name the stage's config"
            )
        overrides = stage.command[stage.command.index(settings.config) + 1 :]
        key = f"stages.{stage.name}"
        checked = check_config(settings.command, settings.config, overrides, key)
        if checked is not None and stage.trains:
            model = check_layout(checked, settings.ranks or config.ranks, models, key)
            models |= {str(stage.output): model} if model else {}
