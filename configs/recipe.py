"""Config of a recipe: stages from raw text to an aligned, exported model, each with what it needs and must reach."""

import re

from pydantic import Field, field_validator, model_validator

from configs.section import Section, check_name

REFERENCE = re.compile(r"\{(\w+)\}")  # {NAME} stands for the folder of stage NAME


class GateConfig(Section):
    """A bound on what a training stage measured; the recipe stops after a stage whose measurement is outside it."""

    metric: str = Field(min_length=1)
    """The measurement in metrics.jsonl: NAME.MEASURE of the last evaluation, as in "sort answers.sampled", or a value
    of the last step, such as loss or reward."""
    at_least: float | None = None
    """The lowest value that passes; left out, there is no lower bound."""
    at_most: float | None = None
    """The highest value that passes; left out, there is no upper bound."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "GateConfig":
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"the gate on {self.metric!r} has no bound; set at_least, at_most, or both")
        return self

    def passes(self, value: float) -> bool:
        """Whether `value` is inside the bounds; NaN is not."""
        low = float("-inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= value <= high

    def shown(self, value: float) -> str:
        """Returns `value` with as many digits, 4 or more, as tell on which side of the bounds it is."""
        texts = (f"{value:.{digits}g}" for digits in range(4, 18))
        return next((text for text in texts if self.passes(float(text)) == self.passes(value)), repr(value))

    def __str__(self) -> str:
        bounds = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        return " and ".join(bounds + ([f"at most {self.at_most:g}"] if self.at_most is not None else []))


class RecipeStageConfig(Section):
    """One stage: a `trivium` command with a config and overrides, whose result goes into a folder of its own."""

    command: str
    """The command after `trivium`, such as sft or "data run"."""
    config: str
    """The config file of the command."""
    title: str = ""
    """The stage's name in tables; left out, the name of its section."""
    about: str = ""
    """What the stage is for, in a sentence or two for the report."""
    set: tuple[str, ...] = ()
    """Overrides of the config, as key=value; {NAME} in a value stands for the folder of the earlier stage NAME, or for
    the input NAME."""
    more: tuple[str, ...] = ()
    """Further overrides, applied after those of `set`; for the command line, where a list replaces that of the file."""
    folder: str = ""
    """The folder of the result, inside the recipe's; left out, the name of the stage."""
    ranks: int | None = Field(default=None, ge=1)
    """The number of ranks of a training stage; left out, the recipe's."""
    gates: tuple[GateConfig, ...] = ()
    """The bounds that the stage has to reach."""

    @field_validator("set", "more")
    @classmethod
    def _are_overrides(cls, overrides: tuple[str, ...]) -> tuple[str, ...]:
        for override in overrides:
            if not re.match(r"[\w.-]+=", override):
                raise ValueError(f'{override!r} is no override; write it as "key=value", e.g. "train.steps=50"')
        return overrides


class SpecimenConfig(Section):
    """A text that a trained model writes at the end of the recipe."""

    command: tuple[str, ...] = Field(min_length=1)
    """The words of the command after `trivium`, such as ["generate", "{pretrain}", "--prompt", "It was"]."""
    typed: str = ""
    """The text that is typed to the command."""


class RecipeConfig(Section):
    """The root of a recipe's config. Stages run in the order in which the file has them."""

    title: str = "Trivium recipe"
    """The heading of the table and of the page."""
    dir: str = Field(min_length=1)
    """The folder of all stages' results, of recipe.json and of report.html."""
    ranks: int = Field(default=1, ge=1)
    """The number of ranks of training stages, on this machine."""
    inputs: dict[str, str] = Field(default={})
    """The folders that stages read and that the recipe does not make, such as a pretrained model's run, by name."""
    stages: dict[str, RecipeStageConfig] = Field(min_length=1)
    """The stages by name."""
    specimens: tuple[SpecimenConfig, ...] = ()
    """Texts that the models write at the end, for the table and the page."""

    @model_validator(mode="after")
    def _stages_refer_to_earlier_ones(self) -> "RecipeConfig":
        before = list(self.inputs)
        for name in self.inputs:
            check_name("input", name)
            if name in self.stages:
                raise ValueError(f"inputs.{name} has the name of a stage, so {{{name}}} would mean both; rename one")
        for name, stage in self.stages.items():
            check_name("stage", name)
            for key, overrides in (("set", stage.set), ("more", stage.more)):
                for override in overrides:
                    self._check_references(override, before, f"stages.{name}.{key}")
            before.append(name)
        for specimen in self.specimens:
            for word in specimen.command:
                self._check_references(word, before, "specimens.command")
        return self

    def _check_references(self, text: str, known: list[str], key: str) -> None:
        for name in REFERENCE.findall(text):
            if name not in known:
                later = "comes later in the file" if name in self.stages else "does not exist"
                names = ", ".join(known) or "none, as this is the first"
                raise ValueError(f"{key}: {text!r} names the stage {name!r}, which {later}; stages before it: {names}")
