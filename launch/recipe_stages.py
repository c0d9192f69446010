"""The stages of a recipe, made from its config: what each runs, writes and starts from, and the gates it must pass."""

import hashlib
import json
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.files import file_sha256
from configs.loader import ConfigError
from configs.recipe import REFERENCE, GateConfig, RecipeConfig, RecipeStageConfig, SpecimenConfig
from launch.bootstrap import TRAINING
from launch.recipe_results import (
    describe_baselines,
    describe_data,
    describe_export,
    describe_samples,
    describe_training,
    measurement,
)

BASELINES = "baselines.json"
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
    "data run": StageKind("data_pipeline.run", "run.dir", "plan/plan.json", describe_data),
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
    the stages whose results a training stage starts from: training does not notice by itself that one of them was made
    again, so the recipe compares their hashes (`made_from`). A stage that notices, such as an export, has none.
    """

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    mark: str
    describe: Callable[[Path], tuple[str, str]]
    needs: tuple["RecipeStage", ...] = ()
    gates: tuple[GateConfig, ...] = ()

    def made_from(self) -> dict[str, str | None]:
        """Hashes of the results that the stage starts from and of its config, and its overrides; {} without `needs`.

        Sections of the config that do not change the result are left out.
        """
        if not self.needs:
            return {}
        found = {f"the result of stage {stage.title}": stage.result() for stage in self.needs}
        for word in self.command:
            if word.endswith(".toml"):
                tree = tomllib.loads(Path(word).read_text(encoding="utf-8"))
                kept = {key: value for key, value in tree.items() if key not in UNIMPORTANT}
                found[word] = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
            elif "=" in word and word.split(".")[0] not in UNIMPORTANT:
                key, _, value = word.partition("=")
                found[f"the override of {key}"] = value
        return found

    def result(self) -> str | None:
        """Hash of what other stages start from: the newest checkpoint's manifest, or without checkpoints the mark."""
        manifests = list(self.output.glob("checkpoints/step_*/manifest.json"))
        newest = max(manifests, key=lambda path: int(path.parent.name.removeprefix("step_")), default=None)
        return file_sha256(newest) if newest else self.fingerprint()

    def missed_gates(self) -> list[str]:
        """Describes each gate that the result does not pass. Raises ConfigError if a gate is on no measurement."""
        missed = []
        for gate in self.gates:
            try:
                value = measurement(self.output, gate.metric)
            except KeyError as error:
                raise ConfigError(
                    f"a gate of stage {self.name} is on {gate.metric!r}, which {self.output} did not measure; it "
                    f"measured {error.args[0]}"
                ) from None
            if not gate.passes(value):
                missed.append(f"{gate.metric} is {value:.4g}, and {gate} is asked")
        return missed

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
    ranks = ("launch.ranks", "--nproc-per-node", str(stage.ranks or config.ranks)) if trains else ()
    overrides = [_filled_in(override, made) for override in stage.set]
    needed = dict.fromkeys(name for override in stage.set for name in REFERENCE.findall(override))
    return RecipeStage(
        name,
        stage.title or name,
        (*ranks, kind.module, stage.config, *overrides, f"{kind.folder_key}={folder}"),
        folder,
        kind.mark,
        kind.describe,
        tuple(made[name] for name in needed) if trains else (),
        stage.gates,
    )


def specimens_of(config: RecipeConfig, stages: list[RecipeStage]) -> list[Specimen]:
    """Makes the specimens of a recipe, with the folders of its stages filled in."""
    made = {stage.name: stage for stage in stages}
    return [_specimen(specimen, made) for specimen in config.specimens]


def _specimen(specimen: SpecimenConfig, made: dict[str, RecipeStage]) -> Specimen:
    return Specimen(tuple(_filled_in(word, made) for word in specimen.command), specimen.typed)


def _filled_in(text: str, made: dict[str, RecipeStage]) -> str:
    """Returns the text with each {NAME} replaced by the folder of stage NAME."""
    return REFERENCE.sub(lambda match: str(made[match[1]].output), text)
